"""The linear Gaussian tasks: the mean of a 10-D Gaussian under a Gaussian or a flat prior.

Lueckmann et al. (2021), supplement T.1 and T.2. As in sbibm's code, "scale 0.1" is a
*variance*: the covariance is 0.1 · I.
"""

from __future__ import annotations

import math

import torch
from sbi.simulators.linear_gaussian import (
    linear_gaussian,
    true_posterior_linear_gaussian_mvn_prior,
)
from sbi.utils import BoxUniform
from torch import Tensor
from torch.distributions import MultivariateNormal

from ._registry import register_task
from ._truncated import sample_truncated_normal
from .base import Task

_DIM = 10
_VARIANCE = 0.1


class _GaussianMean(Task):
    """x ∼ N(θ, 0.1 · I₁₀); subclasses choose the prior."""

    dim_theta = _DIM
    dim_x = _DIM
    exact_reference = True

    def simulate(self, theta: Tensor) -> Tensor:
        covariance = _VARIANCE * torch.eye(_DIM, dtype=theta.dtype)
        return linear_gaussian(theta, torch.zeros(_DIM, dtype=theta.dtype), covariance)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        squared = (x.double() - theta.double()).square().sum(-1)
        log_norm = 0.5 * _DIM * math.log(2 * math.pi * _VARIANCE)
        return (-0.5 * squared / _VARIANCE - log_norm).to(theta.dtype)


@register_task
class GaussianLinear(_GaussianMean):
    """Prior N(0, 0.1 · I₁₀): the posterior is Gaussian."""

    name = "gaussian_linear"

    def __init__(self) -> None:
        self.prior = MultivariateNormal(torch.zeros(_DIM), _VARIANCE * torch.eye(_DIM))

    def sample_reference(self, x: Tensor, num_samples: int) -> Tensor:
        zeros = torch.zeros(_DIM, dtype=torch.float64)
        covariance = _VARIANCE * torch.eye(_DIM, dtype=torch.float64)
        posterior = true_posterior_linear_gaussian_mvn_prior(
            self.check_observation(x), zeros, covariance, zeros, covariance
        )
        return posterior.sample(torch.Size((num_samples,))).float()


@register_task
class GaussianLinearUniform(_GaussianMean):
    """Prior U(−1, 1)¹⁰: the posterior is a Gaussian cut to the box, dimensions independent."""

    name = "gaussian_linear_uniform"

    def __init__(self) -> None:
        self.prior = BoxUniform(-torch.ones(_DIM), torch.ones(_DIM))

    def sample_reference(self, x: Tensor, num_samples: int) -> Tensor:
        # Per dimension by inversion: rejecting in ten dimensions would stall for an x outside.
        mean = self.check_observation(x).expand(num_samples, _DIM)
        return sample_truncated_normal(mean, math.sqrt(_VARIANCE), -1.0, 1.0).float()

"""Gaussian mixture: a broad and a narrow Gaussian of the same mean (Lueckmann et al. 2021, T.7)."""

from __future__ import annotations

import math

import torch
from sbi.utils import BoxUniform
from torch import Tensor

from ._registry import register_task
from ._truncated import log_interval_probability, sample_truncated_normal
from .base import Task

_BOUND = 10.0
_SCALES = (1.0, 0.1)


@register_task
class GaussianMixture(Task):
    """x ∼ ½ N(θ, I₂) + ½ N(θ, 0.01 · I₂) with θ ∼ U(−10, 10)².

    A new component is drawn for every x, as the paper defines the task (some versions of
    sbibm's code draw one for a whole batch). sbi's `gaussian_mixture` is not used: it needs
    pyro, which sbi does not install.
    """

    name = "gaussian_mixture"
    dim_theta = 2
    dim_x = 2
    exact_reference = True

    def __init__(self) -> None:
        self.prior = BoxUniform(-_BOUND * torch.ones(2), _BOUND * torch.ones(2))

    def simulate(self, theta: Tensor) -> Tensor:
        component = torch.randint(0, 2, (len(theta), 1))
        scale = torch.tensor(_SCALES, dtype=theta.dtype)[component]
        return theta + scale * torch.randn_like(theta)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        squared = (x.double() - theta.double()).square().sum(-1)
        per_component = [
            -0.5 * squared / scale**2 - math.log(2 * math.pi * scale**2) for scale in _SCALES
        ]
        log_density = torch.logsumexp(torch.stack(per_component), 0) - math.log(2.0)
        return log_density.to(theta.dtype)

    def sample_reference(self, x: Tensor, num_samples: int) -> Tensor:
        mean = self.check_observation(x)
        # A component's posterior weight is its prior weight times its mass inside the box.
        log_mass = torch.stack(
            [log_interval_probability(mean, s, -_BOUND, _BOUND).sum() for s in _SCALES]
        )
        probabilities = torch.softmax(log_mass, 0)
        component = torch.multinomial(probabilities, num_samples, replacement=True)
        scale = torch.tensor(_SCALES, dtype=torch.float64)[component, None].expand(-1, 2)
        means = mean.expand(num_samples, 2)
        return sample_truncated_normal(means, scale, -_BOUND, _BOUND).float()

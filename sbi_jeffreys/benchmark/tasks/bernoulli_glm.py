"""Bernoulli GLM: a spiking neuron with a smooth 9-lag filter (Lueckmann et al. 2021, T.5, T.6).

The design follows sbibm's recipe, white noise of numpy's legacy generator at seed 42, so that the
constants agree with sbibm's without loading its files.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.nn.functional import softplus

from ._reference import adaptive_importance_sample
from ._registry import register_task
from ._student import StudentMixture
from .base import Task

_NUM_BINS = 100
_NUM_LAGS = 9
_STIMULUS_SEED = 42
_NEWTON_STEPS = 50


class _BernoulliGLM(Task):
    """y_t ∼ Bernoulli(σ(Xθ)_t), t = 1..100, with θ = (offset, filter); prior N(0, P⁻¹).

    The prior precision is 0.5 for the offset and FᵀF for the filter, where F penalises
    second differences.
    """

    dim_theta = 1 + _NUM_LAGS

    def __init__(self) -> None:
        precision = _prior_precision()
        self.prior = MultivariateNormal(
            torch.zeros(self.dim_theta), covariance_matrix=torch.linalg.inv(precision).float()
        )

    def _simulate_spikes(self, theta: Tensor) -> Tensor:
        """θ `(N, 10)` → spikes `(N, 100)`, float64."""
        return torch.bernoulli(torch.sigmoid(theta.double() @ design_matrix().T))

    def _log_likelihood_of_statistics(self, theta: Tensor, statistics: Tensor) -> Tensor:
        """θ · s − Σ_t log(1 + exp(Xθ)_t): `(*B, 10)`, `(*B, 10)` → `(*B,)`, float64."""
        theta = theta.double()
        log_partition = softplus(theta @ design_matrix().T).sum(-1)
        return (theta * statistics.double()).sum(-1) - log_partition

    def _sample_given_statistics(self, statistics: Tensor, num_samples: int) -> Tensor:
        """Draws of p(θ|s) for s `(10,)` → `(num_samples, 10)`.

        The posterior is log-concave: Laplace's approximation with the tails of a t
        distribution, adapted, is an efficient importance proposal.
        """
        precision = _prior_precision()
        mode, hessian = _posterior_mode(statistics, precision)
        initial = StudentMixture.single(mode, torch.linalg.inv(hessian), df=12.0)

        def log_target(theta: Tensor) -> Tensor:
            log_prior = -0.5 * ((theta @ precision) * theta).sum(-1)
            return log_prior + self._log_likelihood_of_statistics(theta, statistics)

        return adaptive_importance_sample(
            log_target, initial, num_samples, self.name, num_components=1, df=12.0,
            draws_per_round=5_000,
        ).float()  # fmt: skip


@register_task
class BernoulliGLM(_BernoulliGLM):
    """x = Xᵀy, the sufficient statistics: spike count and spike-triggered sums."""

    name = "bernoulli_glm"
    dim_x = 1 + _NUM_LAGS

    def simulate(self, theta: Tensor) -> Tensor:
        return (self._simulate_spikes(theta) @ design_matrix()).to(theta.dtype)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """log P(x|θ) for broadcastable `(*B, 10)`, `(*B, 10)` → `(*B,)`.

        With a stimulus drawn from a continuous distribution no two spike trains share their
        statistics, so this is the probability of the one train y with Xᵀy = x.
        """
        return self._log_likelihood_of_statistics(theta, x).to(theta.dtype)

    def sample_reference(self, x: Tensor, num_samples: int) -> Tensor:
        return self._sample_given_statistics(self.check_observation(x), num_samples)


@register_task
class BernoulliGLMRaw(_BernoulliGLM):
    """x = y, the spike train itself."""

    name = "bernoulli_glm_raw"
    dim_x = _NUM_BINS

    def simulate(self, theta: Tensor) -> Tensor:
        return self._simulate_spikes(theta).to(theta.dtype)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        statistics = x.double() @ design_matrix()
        return self._log_likelihood_of_statistics(theta, statistics).to(theta.dtype)

    def sample_reference(self, x: Tensor, num_samples: int) -> Tensor:
        statistics = self.check_observation(x) @ design_matrix()
        return self._sample_given_statistics(statistics, num_samples)


@lru_cache(maxsize=1)
def design_matrix() -> Tensor:
    """X `(100, 10)`, float64: a column of ones and the stimulus at lags 0 to 8."""
    stimulus = np.random.RandomState(_STIMULUS_SEED).randn(_NUM_BINS).astype(np.float32)
    design = np.zeros((_NUM_BINS, 1 + _NUM_LAGS))
    design[:, 0] = 1.0
    for lag in range(_NUM_LAGS):
        design[lag:, 1 + lag] = stimulus[: _NUM_BINS - lag]
    return torch.from_numpy(design)


def _prior_precision() -> Tensor:
    """P `(10, 10)`, float64."""
    first_difference = torch.eye(_NUM_LAGS).double() - torch.diag(torch.ones(8).double(), -1)
    lags = torch.arange(_NUM_LAGS, dtype=torch.float64)
    penalty = first_difference @ first_difference + torch.diag(torch.sqrt(lags / _NUM_LAGS))
    precision = torch.zeros(1 + _NUM_LAGS, 1 + _NUM_LAGS, dtype=torch.float64)
    precision[0, 0] = 0.5
    precision[1:, 1:] = penalty.T @ penalty
    return precision


def _posterior_mode(statistics: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """Mode `(10,)` and minus the Hessian there `(10, 10)`, by damped Newton steps."""
    design = design_matrix()
    theta = torch.zeros(len(precision), dtype=torch.float64)

    def objective(value: Tensor) -> float:
        log_likelihood = value @ statistics - softplus(design @ value).sum()
        return float(log_likelihood - 0.5 * value @ precision @ value)

    for _ in range(_NEWTON_STEPS):
        rate = torch.sigmoid(design @ theta)
        gradient = statistics - design.T @ rate - precision @ theta
        hessian = design.T @ ((rate * (1 - rate))[:, None] * design) + precision
        step = torch.linalg.solve(hessian, gradient)
        if float(gradient @ step) < 1e-16:
            break
        # A full Newton step can overshoot where the sigmoids saturate.
        size, current = 1.0, objective(theta)
        while objective(theta + size * step) < current and size > 1e-8:
            size *= 0.5
        theta = theta + size * step
    rate = torch.sigmoid(design @ theta)
    return theta, design.T @ ((rate * (1 - rate))[:, None] * design) + precision

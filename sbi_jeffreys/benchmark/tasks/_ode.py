"""What SIR and Lotka–Volterra share: log-normal priors, and an integrator of many small ODEs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Independent, LogNormal, MultivariateNormal

from ._reference import adaptive_importance_sample
from .base import Task

# Step times rate. Chosen so that SIR and Lotka–Volterra stay within 1e-4 of scipy's solve_ivp
# at rtol 1e-9 over the priors, tails included (tests/benchmark/test_tasks.py).
_STEP_TIMES_RATE = 0.2
# Bounds the time for extreme θ: 16,384 steps per interval are far beyond any draw of the priors;
# past them the result is finite or NaN, but not accurate.
_MAX_LOG2_STEPS = 14


class LogNormalTask(Task):
    """A task whose prior is log-normal, independently per parameter.

    Attributes:
        loc: Means of log θ.
        scale: Their standard deviations.
        prior_cut: The reference cuts the prior at this many standard deviations of log θ.
    """

    loc: tuple[float, ...]
    scale: tuple[float, ...]
    prior_cut: float = math.inf

    def __init__(self) -> None:
        self.prior = Independent(LogNormal(torch.tensor(self.loc), torch.tensor(self.scale)), 1)

    def sample_reference(self, x: Tensor, num_samples: int) -> Tensor:
        """See `Task`. Adaptive importance sampling in log θ, where the prior is Gaussian."""
        observed = self.check_observation(x)
        scale = torch.tensor(self.scale, dtype=torch.float64)
        log_prior = MultivariateNormal(torch.tensor(self.loc).double(), torch.diag(scale**2))

        def log_target(log_theta: Tensor) -> Tensor:
            inside = ((log_theta - log_prior.mean).abs() < self.prior_cut * scale).all(-1)
            log_joint = log_prior.log_prob(log_theta)
            log_joint[inside] += self.log_likelihood(log_theta[inside].exp(), observed)
            return torch.where(inside, log_joint, -torch.inf)

        log_theta = adaptive_importance_sample(log_target, log_prior, num_samples, self.name)
        return log_theta.exp().float()


def rk4(
    field: Callable[[Tensor], Tensor], start: Tensor, interval: float, count: int, steps: int
) -> Tensor:
    """Classical fourth-order Runge–Kutta with a fixed number of `steps` per interval.

    `field` is dy/dt of an autonomous system, `(K, N)` → `(K, N)`, and `start` y at time 0. Returns
    the states at times 0, interval, 2 · interval, …: `(count, K, N)`.
    """
    step = interval / steps
    states, y = [start], start
    for _ in range(count - 1):
        for _ in range(steps):
            k_1 = field(y)
            k_2 = field(torch.add(y, k_1, alpha=0.5 * step))
            k_3 = field(torch.add(y, k_2, alpha=0.5 * step))
            k_4 = field(torch.add(y, k_3, alpha=step))
            y = torch.add(y, k_1 + k_4 + 2.0 * (k_2 + k_3), alpha=step / 6.0)
        states.append(y)
    return torch.stack(states)


def integrate_coupled_logs(
    constant: Tensor, coupling: Tensor, start: Tensor, rate: Tensor, interval: float, count: int
) -> Tensor:
    """Solve du/dt = a₁ + b₁ eᵛ, dv/dt = a₂ + b₂ eᵘ: SIR and Lotka–Volterra in log populations.

    In logs the populations stay positive, and the long exponential phases are straight lines,
    which RK4 follows exactly.

    Args:
        constant: a, `(2, N)`, float64.
        coupling: b, `(2, N)`.
        start: (u, v) at time 0, `(2, N)`.
        rate: Fastest rate of change that each system reaches, `(N,)`; it sets the system's step.
        interval: Time between two saved states.
        count: Number of saved states, the start included.

    Returns:
        `(N, 2, count)`.
    """
    out = torch.full((count, *start.shape), torch.nan, dtype=start.dtype)
    wanted = torch.log2((interval * rate / _STEP_TIMES_RATE).clamp_min(1.0)).ceil()
    # Systems of similar speed run together; the others do not affect a system's result.
    log2_steps = wanted.clamp_max(_MAX_LOG2_STEPS)
    for value in log2_steps[~log2_steps.isnan()].unique().tolist():
        index = torch.nonzero(log2_steps == value).squeeze(-1)
        a, b = constant[:, index], coupling[:, index]

        def field(y: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            return torch.addcmul(a, b, torch.exp(y.flip(0)))

        out[:, :, index] = rk4(field, start[:, index], interval, count, 2 ** int(value))
    return out.permute(2, 1, 0)

"""SIR: an epidemic with a contact rate and a recovery rate (Lueckmann et al. 2021, T.9)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._ode import LogNormalTask, integrate_coupled_logs
from ._registry import register_task

_POPULATION = 1e6
_INFECTED = 1.0
_NUM_TESTED = 1000
# sbibm solves 160 days at a step of one day and keeps every 17th state: days 0, 17, ..., 153.
_INTERVAL = 17.0
_NUM_TIMES = 10


@register_task
class SIR(LogNormalTask):
    """dS/dt = −βSI/N, dI/dt = βSI/N − γI over 160 days, N = 10⁶, I(0) = 1.

    x_t ∼ Binomial(1000, I(t)/N) at ten times; β ∼ LogNormal(log 0.4, 0.5),
    γ ∼ LogNormal(log 0.125, 0.2).
    """

    name = "sir"
    dim_theta = 2
    dim_x = _NUM_TIMES
    loc = (math.log(0.4), math.log(0.125))
    scale = (0.5, 0.2)

    def simulate(self, theta: Tensor) -> Tensor:
        infected = log_infected_share(theta).exp().clamp(0.0, 1.0)
        counts = torch.binomial(torch.full_like(infected, _NUM_TESTED), infected)
        return counts.to(theta.dtype)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        log_share = log_infected_share(theta.reshape(-1, 2)).reshape(*theta.shape[:-1], -1)
        log_share = log_share.clamp_max(-1e-12)
        counts = x.double()
        n = float(_NUM_TESTED)
        log_choose = math.lgamma(n + 1) - torch.lgamma(counts + 1) - torch.lgamma(n - counts + 1)
        log_rest = torch.log(-torch.expm1(log_share))
        log_pmf = log_choose + counts * log_share + (n - counts) * log_rest
        return log_pmf.sum(-1).to(theta.dtype)


def log_infected_share(theta: Tensor) -> Tensor:
    """log I(t)/N at days 0, 17, ..., 153: θ `(N, 2)` → `(N, 10)`, float64."""
    beta, gamma = theta.double().unbind(-1)
    constant = torch.stack((torch.zeros_like(gamma), -gamma))
    coupling = torch.stack((-beta, beta))
    start = torch.log(torch.tensor([_POPULATION - _INFECTED, _INFECTED]).double() / _POPULATION)
    logs = integrate_coupled_logs(
        constant, coupling, start[:, None].expand(2, len(beta)), torch.maximum(beta, gamma),
        _INTERVAL, _NUM_TIMES,
    )  # fmt: skip
    return logs[:, 1]

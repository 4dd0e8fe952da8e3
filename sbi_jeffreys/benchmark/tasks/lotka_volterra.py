"""Lotka–Volterra: predators and prey (Lueckmann et al. 2021, T.10)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._ode import LogNormalTask, integrate_coupled_logs
from ._registry import register_task

_START = (30.0, 1.0)
_NOISE = 0.1
# sbibm solves 20 days at a step of 0.1 and keeps every 21st state: days 0, 2.1, ..., 18.9.
_INTERVAL = 2.1
_NUM_TIMES = 10
_LOG_CLAMP = (math.log(1e-10), math.log(1e4))


@register_task
class LotkaVolterra(LogNormalTask):
    """dX/dt = αX − βXY, dY/dt = −γY + δXY over 20 days, X(0) = 30, Y(0) = 1.

    x ∼ LogNormal(log X(t), 0.1) at ten times, the prey's then the predators', populations
    clamped to [1e-10, 1e4]; α, γ ∼ LogNormal(−0.125, 0.5), β, δ ∼ LogNormal(−3, 0.5).
    """

    name = "lotka_volterra"
    dim_theta = 4
    dim_x = 2 * _NUM_TIMES
    loc = (-0.125, -3.0, -0.125, -3.0)
    scale = (0.5, 0.5, 0.5, 0.5)
    # 1e-8 of the prior's mass lies outside, where one orbit can take seconds to integrate.
    prior_cut = 6.0

    def simulate(self, theta: Tensor) -> Tensor:
        log_mean = _log_mean(theta)
        return (log_mean + _NOISE * torch.randn_like(log_mean)).exp().to(theta.dtype)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """log p(x|θ) for broadcastable `(*B, 4)`, `(*B, 20)` → `(*B,)`; −∞ where x ≤ 0."""
        log_mean = _log_mean(theta.reshape(-1, 4)).reshape(*theta.shape[:-1], -1)
        log_x = torch.log(x.double())
        squared = ((log_x - log_mean) / _NOISE).square()
        log_density = -0.5 * squared - math.log(_NOISE * math.sqrt(2 * math.pi)) - log_x
        positive = (x > 0).all(-1)
        return torch.where(positive, log_density.sum(-1), -torch.inf).to(theta.dtype)


def log_populations(theta: Tensor) -> Tensor:
    """log X(t), log Y(t) at days 0, 2.1, ..., 18.9: θ `(N, 4)` → `(N, 2, 10)`, float64."""
    alpha, beta, gamma, delta = theta.double().unbind(-1)
    start = torch.log(torch.tensor(_START, dtype=torch.float64))
    return integrate_coupled_logs(
        torch.stack((alpha, -gamma)), torch.stack((-beta, delta)),
        start[:, None].expand(2, len(alpha)), _fastest_rate(alpha, beta, gamma, delta),
        _INTERVAL, _NUM_TIMES,
    )  # fmt: skip


def _log_mean(theta: Tensor) -> Tensor:
    """Location of the log-normal noise: `(N, 4)` → `(N, 20)`."""
    return log_populations(theta).flatten(1).clamp(*_LOG_CLAMP)


def _fastest_rate(alpha: Tensor, beta: Tensor, gamma: Tensor, delta: Tensor) -> Tensor:
    """The largest rate of the logs along an orbit, from its conserved quantity; `(N,)` each.

    With p = δX and q = βY, p − γ log p + q − α log q never changes, so p is largest where
    q's part is smallest (q = α), and the other way round.
    """
    p, q = delta * _START[0], beta * _START[1]
    conserved = p - gamma * torch.log(p) + q - alpha * torch.log(q)
    largest_p = _larger_root(conserved - alpha + alpha * torch.log(alpha), gamma)
    largest_q = _larger_root(conserved - gamma + gamma * torch.log(gamma), alpha)
    return torch.stack((alpha, gamma, largest_p, largest_q)).amax(0)


def _larger_root(level: Tensor, c: Tensor) -> Tensor:
    """The larger z with z − c log z = level, approached from above."""
    # The tangent of the logarithm at 2c bounds it: z ≤ 2 (level + c log 2c − c).
    z = 2 * (level + c * torch.log(2 * c) - c)
    for _ in range(20):
        z = level + c * torch.log(z)
    return z

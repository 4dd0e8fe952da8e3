"""The partition function of a proxy, and contrasts for an energy: draws from a defensive mixture.

m(θ|x) = ¾ p_φ(θ|x) + ¼ p(θ), of main and prior, covers the posterior also where the main does not:
m ≥ p/4 bounds the importance weights q̃_ψ/m by 4 exp(γ f_ψ) (Hesterberg 1995).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.networks.embedding import embedded_once
from sbi_jeffreys.objective import effective_sample_size, log_normaliser
from sbi_jeffreys.proxies.base import Proxy

__all__ = [
    "Contrasts",
    "defensive_draws",
    "defensive_log_density",
    "defensive_log_normaliser",
    "draw_atoms",
    "draw_contrasts",
]

_MAIN_SHARE = 0.75
_CHUNK = 50_000  # pairs per call of the main: bounds memory


@torch.no_grad()
def defensive_draws(
    proxy: Proxy,
    main: ConditionalDensityEstimator,
    x: Tensor,
    num: int,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws θ_k ∼ m(·|x), those of the main first, with their densities.

    Args:
        proxy: Supplies the prior.
        main: Trained density estimator of θ given x.
        x: Observations `(B, *x_shape)`.
        num: K, draws per observation, at least 2.
        first: Further θ `(B, D)` to evaluate, put before the draws.

    Returns:
        θ `(K, B, D)`, log m `(K, B)` and log p(θ) `(K, B)`; K + 1 in place of K with `first`.
    """
    from_main = min(num - 1, max(1, round(_MAIN_SHARE * num)))
    with embedded_once(main, x):
        theta = main.sample(torch.Size((from_main,)), x)
        # Drawn flat: not every prior takes two-dimensional sample shapes.
        flat = proxy.sample_prior((num - from_main) * len(x)).to(theta)
        theta = torch.cat([theta, flat.reshape(-1, *theta.shape[1:])])
        if first is not None:
            theta = torch.cat([first.unsqueeze(0), theta])
        log_m, log_prior = defensive_log_density(proxy, main, theta, x, from_main / num)
    return theta, log_m, log_prior


@torch.no_grad()
def defensive_log_density(
    proxy: Proxy,
    main: ConditionalDensityEstimator,
    theta: Tensor,
    x: Tensor,
    share: float = _MAIN_SHARE,
) -> tuple[Tensor, Tensor]:
    """log m(θ|x) and log p(θ) of θ `(K, B, D)`, `(K, B)` each; `share` is the main's share of m."""
    with embedded_once(main, x):
        # Where the main fails, the points are left to the prior's share of the mixture.
        log_main = main.log_prob(theta, x).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    log_prior = proxy.log_prior(theta)
    log_m = torch.logaddexp(log_main + math.log(share), log_prior + math.log1p(-share))
    return log_m, log_prior


@torch.no_grad()
def defensive_log_normaliser(
    proxy: Proxy, main: ConditionalDensityEstimator, x: Tensor, num: int
) -> tuple[Tensor, Tensor]:
    """log Ẑ_ψ(x) by importance sampling from m, and the effective sample size.

    Args:
        proxy: A fitted proxy.
        main: Supplies most of the draws.
        x: Observations `(B, *x_shape)`.
        num: Draws per observation, at least 4.

    Returns:
        log Ẑ `(B,)`, and Kish's effective sample sizes in [0, num], `(B,)`.
    """
    theta, log_m, _ = defensive_draws(proxy, main, x, num)
    log_q = proxy.log_potential(theta, x)
    return log_normaliser(log_q, log_m), effective_sample_size(log_q - log_m)


@dataclass
class Contrasts:
    """K contrasts of B pairs, and the offset that turns f_ψ into v = log q̃_ψ − log m.

    Attributes:
        theta: θ_k, shape `(K, B, D)`.
        offset: log p(θ_k) − log m(θ_k|x), shape `(K, B)`; −∞ outside the prior.
        offset_true: The same at the pairs' own θ, shape `(B,)`.
    """

    theta: Tensor
    offset: Tensor
    offset_true: Tensor

    def pick(self, rows: Tensor, num: int) -> Contrasts:
        """`num` of the contrasts, chosen at random, for the pairs at `rows`."""
        which = torch.randperm(len(self.theta), device=rows.device)[:num].unsqueeze(1)
        return Contrasts(self.theta[which, rows], self.offset[which, rows], self.offset_true[rows])


def draw_contrasts(
    proxy: Proxy, main: ConditionalDensityEstimator, theta: Tensor, x: Tensor, num: int
) -> Contrasts:
    """Contrasts from the defensive mixture, in random order: any subset follows it, too.

    Args:
        proxy: Supplies the prior.
        main: Trained density estimator of θ given x.
        theta: The pairs' own θ, shape `(B, D)`.
        x: Observations, shape `(B, *x_shape)`.
        num: K, contrasts per pair, at least 2.
    """
    rows, thetas, offsets = max(1, _CHUNK // num), [], []
    for own, observed in zip(theta.split(rows), x.split(rows)):
        drawn, log_m, log_prior = defensive_draws(proxy, main, observed, num, own)
        thetas.append(drawn[1:])
        offsets.append(torch.where(torch.isfinite(log_prior), log_prior - log_m, -torch.inf))
    order = torch.randperm(num, device=theta.device)
    offset = torch.cat(offsets, dim=1)
    return Contrasts(torch.cat(thetas, dim=1)[order], offset[1:][order], offset[0])


def draw_atoms(theta: Tensor, num: int) -> Contrasts:
    """Contrasts from the pairs' own marginal p̃(θ), which cancels: v = f_ψ up to a constant.

    Args:
        theta: The pairs' θ, shape `(B, D)`.
        num: K, contrasts per pair.
    """
    batch, device = len(theta), theta.device
    # Never a pair's own θ: shifted by 1 … B − 1 places.
    shift = torch.randint(1, max(2, batch), (num, batch), device=device)
    others = theta[(torch.arange(batch, device=device) + shift) % batch]
    none = torch.zeros_like(others[..., 0])
    return Contrasts(others, none, none[0])

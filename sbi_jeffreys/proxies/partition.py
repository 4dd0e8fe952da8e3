"""Contrasts θ_k for fitting an energy: draws from a known density that covers the posterior."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.networks.embedding import embedded_once
from sbi_jeffreys.proxies.base import Proxy

__all__ = ["Contrasts", "draw_atoms", "draw_contrasts"]

_MAIN_SHARE = 0.75
_CHUNK = 50_000  # pairs per call of the main: bounds memory


@dataclass
class Contrasts:
    """K contrasts of B pairs, with what turns f_ψ into v = log q̃_ψ − log m there.

    Attributes:
        theta: θ_k, shape `(K, B, D)`.
        offset: log p(θ_k) − log m(θ_k|x), shape `(K, B)`; −∞ outside the prior.
        offset_true: The same at the pairs' own θ, shape `(B,)`.
    """

    theta: Tensor
    offset: Tensor
    offset_true: Tensor

    def pick(self, rows: Tensor, num: int) -> Contrasts:
        """A random `num` of them for the pairs at `rows`."""
        which = torch.randperm(len(self.theta), device=rows.device)[:num].unsqueeze(1)
        return Contrasts(
            self.theta[which, rows],
            self.offset[which, rows],
            self.offset_true[rows],
        )


@torch.no_grad()
def draw_contrasts(
    proxy: Proxy, main: ConditionalDensityEstimator, theta: Tensor, x: Tensor, num: int
) -> Contrasts:
    """Contrasts from the defensive mixture m(θ|x) of main (¾) and prior (¼).

    Args:
        proxy: Supplies the prior.
        main: Trained density estimator of θ given x.
        theta: The pairs' own θ, shape `(B, D)`.
        x: Observations, shape `(B, *x_shape)`.
        num: K, contrasts per pair, at least 2.

    Returns:
        Contrasts in random order, so that any subset of them is the mixture, too.
    """
    rows = max(1, _CHUNK // num)
    parts = [_draw(proxy, main, t, o, num) for t, o in zip(theta.split(rows), x.split(rows))]
    return Contrasts(
        torch.cat([p.theta for p in parts], dim=1),
        torch.cat([p.offset for p in parts], dim=1),
        torch.cat([p.offset_true for p in parts]),
    )


def _draw(
    proxy: Proxy, main: ConditionalDensityEstimator, theta: Tensor, x: Tensor, num: int
) -> Contrasts:
    from_main = min(num - 1, max(1, round(_MAIN_SHARE * num)))
    theta_prior = proxy.prior.sample(torch.Size((num - from_main, len(x)))).to(theta)
    with embedded_once(main, x):
        theta_main = main.sample(torch.Size((from_main,)), x)
        drawn = torch.cat([theta_main, theta_prior])[torch.randperm(num, device=theta.device)]
        everything = torch.cat([theta.unsqueeze(0), drawn])
        # A main that fails somewhere leaves those points to the prior's share of the mixture.
        log_main = main.log_prob(everything, x).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    log_prior, share = proxy.log_prior(everything), from_main / num
    log_m = torch.logaddexp(log_main + math.log(share), log_prior + math.log(1 - share))
    offset = torch.where(torch.isfinite(log_prior), log_prior - log_m, -torch.inf)
    return Contrasts(drawn, offset[1:], offset[0])


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

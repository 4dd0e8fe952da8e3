"""The pool: what G and R are evaluated at.

A proxy with a density of x draws pairs (θ̃, x̃) of its joint, as many as are needed. A proxy without
one has the observations of the training simulations alone, and several θ̃_k ∼ q_ψ(·|x) for each of
them, drawn once, before the symmetric stage, by adaptive importance resampling from the stage-0
main and the prior. On either pool G is plain maximum likelihood. (Reweighting samples of the main
while it moves is not: once the main has lost a region, no weight brings it back.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.objective import effective_sample_size, truncated_log_weights
from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.proxies.normaliser import adapted_draws

__all__ = ["Pool", "draw_pool", "resampled_pool", "tempering_weights"]

_DRAWS, _KEPT = 256, 64  # per observation: draws of the adapted proposal, and θ̃ kept of them
_FEW = 10.0  # effective draws below which an observation weighs less
_ROWS = 50  # observations at once: bounds memory
_MAX_OBSERVATIONS = 5_000  # at which θ̃ are resampled


@dataclass
class Pool:
    """Observations that G and R are evaluated at, with θ̃ that follow the proxy's posterior.

    Attributes:
        theta: One θ̃ for each observation, `(N, D)`, or K for each, `(K, N, D)`.
        x: Shape `(N, *x_shape)`.
        weights: How often each observation is drawn, in proportion, `(N,)`.
        renewable: Whether it may be drawn anew from the proxy's joint, and cheaply.
    """

    theta: Tensor
    x: Tensor
    weights: Tensor
    renewable: bool = False

    @property
    def grouped(self) -> bool:
        """Whether there are several θ̃ for each observation."""
        return self.theta.ndim == 3

    def draw(self, num: int) -> Tensor:
        """Rows of `num` draws of observations with replacement."""
        return torch.multinomial(self.weights, num, replacement=True)

    def theta_at(self, rows: Tensor, num: int) -> Tensor:
        """`num` of the θ̃ of each observation at `rows` `(B,)` of a grouped pool, `(num, B, D)`."""
        which = torch.randint(len(self.theta), (num, len(rows)), device=rows.device)
        return self.theta[which, rows]


def draw_pool(
    proxy: Proxy, rows_theta: Tensor, first_round: bool, num_draws: int
) -> tuple[Tensor, Tensor]:
    """Pairs of a proxy that can sample x.

    Args:
        proxy: A fitted proxy.
        rows_theta: θ of the training simulations, `(N, D)`.
        first_round: Whether θ̃ come from the prior; else they are those of training simulations, so
            that observations lie where the rounds simulate.
        num_draws: Size of the pool.

    Returns:
        θ̃ `(N, D)` and x̃ `(N, *x_shape)`.
    """
    if first_round:
        return proxy.sample_joint(num_draws)
    return proxy.sample_given(rows_theta[torch.randint(len(rows_theta), (num_draws,))])


@torch.no_grad()
def resampled_pool(
    proxy: Proxy, main: ConditionalDensityEstimator, theta: Tensor, x: Tensor
) -> Pool:
    """θ̃_k ∼ q_ψ(·|x) at given observations, by adaptive importance resampling.

    An observation with few effective draws is drawn less often, in proportion.

    Args:
        proxy: A fitted proxy.
        main: The main after stage 0.
        theta: The pairs' own θ, `(N, D)`, which are not among the θ̃.
        x: Observations `(N, *x_shape)`, of which the first 5,000 are used.
    """
    theta, x = theta[:_MAX_OBSERVATIONS], x[:_MAX_OBSERVATIONS]
    kept, effective = [], []
    for own, observed in zip(theta.split(_ROWS), x.split(_ROWS)):
        draws = adapted_draws(proxy, main, own, observed, _DRAWS)
        log_w = draws.log_weights(proxy.inverse_temperature)[1:].nan_to_num(nan=-torch.inf)
        usable = torch.isfinite(log_w).any(dim=0)
        weights = truncated_log_weights(torch.where(usable, log_w, 0.0)).exp()
        rows = torch.multinomial(weights.T, _KEPT, replacement=True).T  # (K, B)
        columns = torch.arange(len(own), device=rows.device)
        kept.append(draws.theta[1:][rows, columns])
        effective.append(torch.where(usable, effective_sample_size(log_w), 0.0))
    share = (torch.cat(effective) / _FEW).clamp_max(1.0)  # mutant: collapsed-weights-trusted
    return Pool(torch.cat(kept, dim=1), x, share)


@torch.no_grad()
def tempering_weights(proxy: Proxy, theta: Tensor, x: Tensor) -> Tensor:
    """Weights in proportion to ℓ_ψ^{γ−1}: under them, θ given x follows q_{ψ,γ} in the pool.

    Args:
        proxy: The proxy, at its temperature.
        theta: Of the pool, `(N, D)`.
        x: Of the pool.

    Returns:
        Shape `(N,)`, mean one; ones at γ = 1.
    """
    gamma = proxy.inverse_temperature
    if gamma == 1 or len(x) == 0:
        return torch.ones(len(x), device=x.device)
    # mutant: pool-not-tempered
    log_weights = (gamma - 1) * proxy.log_factor(theta.unsqueeze(0), x)[0]
    return len(x) * truncated_log_weights(log_weights).exp()

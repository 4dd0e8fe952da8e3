"""The pool: the observations and draws of θ at which G and R are evaluated.

A proxy with a density of x draws as many pairs (θ̃, x̃) of its joint as are needed. For a proxy
without one, the pool has only the observations of the training simulations, and several
θ̃_k ∼ q_ψ(·|x) for each of them. These are drawn once, before the symmetric stage, by adaptive
importance resampling from the stage-0 main and the prior. On either pool G is plain maximum
likelihood. (Samples of the main, reweighted as it changes, would not do: once the main has lost a
region, no weight brings that region back.) In later rounds, where θ do not follow the prior, Markov
chains take the θ of the pairs to the proxy's posteriors (`proxies.chains`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.networks.prior_space import inside_support
from sbi_jeffreys.objective import effective_sample_size, truncated_log_weights
from sbi_jeffreys.proxies.base import EmpiricalPrior, Proxy
from sbi_jeffreys.proxies.chains import MixtureOfRounds, moved_to_prior
from sbi_jeffreys.proxies.normaliser import adapted_draws

__all__ = [
    "Pool",
    "draw_pool",
    "local_trust",
    "pool_of_later_rounds",
    "resampled_pool",
    "tempering_weights",
]

_DRAWS, _KEPT = 256, 64  # draws of the adapted proposal per observation, and θ̃ kept of them
_FEW = 10.0  # effective draws below which an observation weighs less
_BEHIND = 3.0  # nats by which a proxy may be behind the main at a pair before its x weighs less
_ROWS = 50  # observations at once: bounds memory
_PATIENCE = 4  # rounds of adaptation without progress at an observation
_MAX_OBSERVATIONS = 5_000  # most x at which there are several θ̃


@dataclass
class Pool:
    """Observations that G and R are evaluated at, with θ̃ that follow the proxy's posterior.

    Attributes:
        theta: One θ̃ for each observation, `(N, D)`, or K for each, `(K, N, D)`.
        x: Shape `(N, *x_shape)`.
        weights: How often each observation is drawn, in proportion, `(N,)`.
        renewable: Whether the pool is drawn anew from the proxy's joint once it has been used.
        uses: How often each pair is drawn, on average, before a renewable pool is drawn anew.
        asked: How many pairs the proxy was asked for; it may have left out implausible ones. 0
            where none were drawn.
    """

    theta: Tensor
    x: Tensor
    weights: Tensor
    renewable: bool = False
    uses: int = 2
    asked: int = 0

    @property
    def grouped(self) -> bool:
        """Whether there are several θ̃ for each observation."""
        return self.theta.ndim == 3

    def draw(self, num: int) -> Tensor:
        """Indices of `num` observations, drawn by their weights with replacement."""
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
        first_round: Whether θ̃ come from the prior; else they come from a kernel density of the
            training simulations' θ, so that observations lie where the rounds simulate.
        num_draws: Size of the pool.

    Returns:
        θ̃ `(N, D)` and x̃ `(N, *x_shape)`.
    """
    if first_round:
        return proxy.sample_joint(num_draws)
    theta = rows_theta[torch.randint(len(rows_theta), (num_draws,))]
    drawn = EmpiricalPrior(rows_theta).sample(torch.Size((num_draws,)))
    inside = inside_support(proxy.prior, drawn).unsqueeze(1)
    theta = torch.where(inside, drawn, theta)  # mutant: later-rounds-on-few-parameters
    return proxy.sample_given(theta)


def pool_of_later_rounds(
    proxy: Proxy,
    theta: Tensor,
    x: Tensor,
    mixture: MixtureOfRounds,
    archive: Tensor,
    show_progress_bars: bool = False,
) -> Pool:
    """Pairs whose θ̃ follow q_ψ(·|x), from pairs whose θ follow the rounds' proposals.

    Args:
        proxy: A fitted proxy.
        theta: Shape `(N, D)`.
        x: Draws of the proxy for these θ, or simulations, `(N, *x_shape)`. There is one θ̃ for each
            draw; for each of the simulations, of which the first 5,000 are used, there are several.
        mixture: The prior and the rounds' θ.
        archive: θ whose differences have the scale of the posteriors, `(M, D)`.
        show_progress_bars: Whether to show progress.
    """
    num = 1 if proxy.can_sample else _KEPT
    most = len(x) if proxy.can_sample else _MAX_OBSERVATIONS
    theta, x = theta[:most], x[:most]
    theta = moved_to_prior(proxy, theta, x, mixture, archive, num, show_progress_bars)
    inside = torch.isfinite(proxy.log_prior(theta))  # mutant: pairs-outside-the-prior-followed
    return Pool(theta[0] if proxy.can_sample else theta, x, inside.to(theta).mean(dim=0))


@torch.no_grad()
def resampled_pool(
    proxy: Proxy, main: ConditionalDensityEstimator, theta: Tensor, x: Tensor
) -> Pool:
    """θ̃_k ∼ q_ψ(·|x) at given observations, by adaptive importance resampling.

    An observation with few effective draws is drawn less often, in proportion, and so is one at
    whose own θ the proxy is far behind the main; see `local_trust`.

    Args:
        proxy: A fitted proxy.
        main: The main after stage 0.
        theta: The pairs' own θ from the prior, `(N, D)`, which are not among the θ̃.
        x: Observations `(N, *x_shape)`, of which the first 5,000 are used.
    """
    theta, x = theta[:_MAX_OBSERVATIONS], x[:_MAX_OBSERVATIONS]
    gamma = proxy.inverse_temperature
    kept, shares = [], []
    for own, observed in zip(theta.split(_ROWS), x.split(_ROWS)):
        draws = adapted_draws(proxy, main, own, observed, _DRAWS, patience=_PATIENCE)
        log_w = draws.log_weights(gamma)[1:].nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        usable = torch.isfinite(log_w).any(dim=0)
        weights = truncated_log_weights(torch.where(usable, log_w, 0.0)).exp()
        rows = torch.multinomial(weights.T, _KEPT, replacement=True).T  # (K, B)
        columns = torch.arange(len(own), device=rows.device)
        kept.append(draws.theta[1:][rows, columns])
        effective = torch.where(usable, effective_sample_size(log_w), 0.0)
        share = (effective / _FEW).clamp_max(1.0)  # mutant: collapsed-weights-trusted
        log_q = draws.log_potential(gamma)[0] - draws.log_normaliser(gamma).pessimistic
        log_p = main.log_prob(own.unsqueeze(0), observed)[0]
        shares.append(share * local_trust(log_p, log_q))  # mutant: absurd-at-some-x-followed
    return Pool(torch.cat(kept, dim=1), x, torch.cat(shares))


def local_trust(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""Weights of observations by the densities of main and proxy at the pairs' own θ.

    If θ follows q, the mean of p(θ|x) / q(θ|x) is 1 whatever p is, so by Markov's inequality the
    ratio exceeds e³ at fewer than one in twenty pairs. Where it does, the proxy is probably wrong,
    and the weight is e³ q / p.

    Args:
        log_p: log p(θ|x) of the main, `(B,)`.
        log_q: log q(θ|x) of the proxy, `(B,)`.

    Returns:
        Shape `(B,)`, in [0, 1]; 1 where the ratio is unknown.

    Example:
        >>> local_trust(torch.tensor([0.0, 0.0]), torch.tensor([-2.0, -4.0]))
        tensor([1.0000, 0.3679])
    """
    return (log_q - log_p + _BEHIND).exp().clamp_max(1.0).nan_to_num(nan=1.0)


@torch.no_grad()
def tempering_weights(proxy: Proxy, theta: Tensor, x: Tensor) -> Tensor:
    """Weights in proportion to ℓ_ψ^{γ−1}: under them, θ given x follows q_{ψ,γ} in the pool.

    Args:
        proxy: The proxy, at its temperature.
        theta: θ̃ of the pool, `(N, D)`.
        x: x̃ of the pool, `(N, *x_shape)`.

    Returns:
        Shape `(N,)`, mean one; ones at γ = 1.
    """
    gamma = proxy.inverse_temperature
    if gamma == 1 or len(x) == 0:
        return torch.ones(len(x), device=x.device)
    # mutant: pool-not-tempered
    log_weights = (gamma - 1) * proxy.log_factor(theta.unsqueeze(0), x)[0]
    return len(x) * truncated_log_weights(log_weights).exp()

r"""The partition function of a proxy at given observations, by adaptive importance sampling.

Importance sampling from a proposal that is wider than the proxy estimates log Z too low: E log Ẑ ≤
log Z, and the more so the sharper the proxy. A held-out loss −log q̃ + log Ẑ is then too low
exactly where the proxy is overconfident. Two remedies are implemented here.

*Adaptation.* Draws θ_k of main and prior are weighted by (q̃/m)^τ, with the largest τ ≤ 1 that keeps
a fifth of them effective. The next proposal is one third each of main and prior, of a Student
distribution with the mean and covariance of the weighted draws, and of Student kernels about
resampled draws. This is repeated until half of the draws are effective, or a fifth of them in three
rounds, and at most twelve times (population Monte Carlo, Cappé et al. 2004, with annealed weights,
Neal 2001, arXiv physics/9803008). The estimate comes from the last round's draws alone: their
proposal does not depend on them, so Ẑ is unbiased.

*A bound from the other side.* With the pair's own θ* among the draws the estimate is biased upwards
where θ* follows q (bidirectional Monte Carlo; Grosse et al. 2015, arXiv 1511.02543). The larger of
the two estimates is the pessimistic one; where they are far apart, the pair is marked as uncertain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.objective import effective_sample_size, log_normaliser
from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.proxies.kernels import Kernels, WeightedDraws
from sbi_jeffreys.proxies.partition import defensive_draws, defensive_log_density

__all__ = ["AdaptedDraws", "Normaliser", "adapted_draws"]

_MAX_ROUNDS = 12  # rounds of adaptation after the first draws
# A pair is settled once plenty of the draws are effective, or enough of them in three rounds.
_PLENTY, _ENOUGH, _GOOD_ROUNDS = 0.5, 0.2, 3
_PROGRESS = 1.25  # a round makes progress if it raises the effective number by a quarter
_AGREE = 0.1  # nats within which the bounds count as one
_POWERS = torch.logspace(0, -3, 25)
_MIN_EFFECTIVE = 20.0  # effective draws below which an estimate is uncertain


@dataclass(frozen=True)
class Normaliser:
    """Estimates of log Z at B observations.

    Attributes:
        lower: log Ẑ from the draws, biased low, `(B,)`.
        upper: log Ẑ with the pairs' own θ among them, `(B,)`.
        effective: Kish's effective number of draws, `(B,)`.
        num_draws: Draws per observation that the estimates come from.
    """

    lower: Tensor
    upper: Tensor
    effective: Tensor
    num_draws: int

    @property
    def pessimistic(self) -> Tensor:
        """The larger of the two bounds, with which the proxy's loss is highest, `(B,)`."""
        return torch.maximum(self.lower, self.upper)  # mutant: normaliser-own-theta-left-out

    @property
    def uncertain(self) -> Tensor:
        """Where the bounds are apart, or too few draws carry the estimate, `(B,)`."""
        apart = (self.upper - self.lower).abs() > _AGREE
        return apart | (self.effective < _MIN_EFFECTIVE) | ~torch.isfinite(self.lower)


@dataclass(frozen=True)
class AdaptedDraws:
    """The pairs' own θ and draws of the last proposal at B observations, with their densities.

    Attributes:
        theta: The pairs' own θ in row 0, and the draws after it, `(1 + K, B, D)`.
        log_prior: log p(θ), −∞ outside the prior, `(1 + K, B)`.
        log_m: log m(θ|x), with the proposal m, `(1 + K, B)`.
        factor: f_ψ(θ, x), without temperature; 0 outside the prior, `(1 + K, B)`.
    """

    theta: Tensor
    log_prior: Tensor
    log_m: Tensor
    factor: Tensor

    @classmethod
    def of(
        cls, proxy: Proxy, theta: Tensor, x: Tensor, log_m: Tensor, log_prior: Tensor
    ) -> AdaptedDraws:
        """From θ `(1 + K, B, D)`, their proposal's log density and their prior's."""
        inside = torch.isfinite(log_prior)
        factor = proxy.log_factor_inside(theta, x, inside)
        return cls(theta, log_prior, log_m, torch.where(inside, factor, 0.0))

    @property
    def offset(self) -> Tensor:
        """log p(θ) − log m(θ|x), −∞ outside the prior and where m is not known, `(1 + K, B)`."""
        known = torch.isfinite(self.log_prior) & ~torch.isnan(self.log_m)
        return torch.where(known, self.log_prior - self.log_m, -torch.inf)

    def log_weights(self, inverse_temperature: Tensor | float) -> Tensor:
        """log q̃ − log m at an inverse temperature, `(1 + K, B)`."""
        return self.offset + inverse_temperature * self.factor

    def log_normaliser(self, inverse_temperature: Tensor | float) -> Normaliser:
        """Bounds on log Z_ψ(x) at an inverse temperature near the one that draws are adapted to."""
        log_w = self.log_weights(inverse_temperature)
        none = torch.zeros_like(log_w)
        return Normaliser(
            log_normaliser(log_w[1:], none[1:]),
            log_normaliser(log_w, none),
            effective_sample_size(log_w[1:]),
            len(log_w) - 1,
        )

    def log_potential(self, inverse_temperature: Tensor | float) -> Tensor:
        """log q̃ of the draws at an inverse temperature, `(1 + K, B)`."""
        return self.log_prior + inverse_temperature * self.factor

    def replace(self, rows: Tensor, other: AdaptedDraws) -> None:
        """Take the observations at `rows` from other draws."""
        for mine, others in zip(self._tensors(), other._tensors()):
            mine[:, rows] = others

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.theta, self.log_prior, self.log_m, self.factor

    @classmethod
    def together(cls, parts: Sequence[AdaptedDraws]) -> AdaptedDraws:
        """The draws at several groups of observations, one after the other."""
        return cls(*(torch.cat(each, dim=1) for each in zip(*(p._tensors() for p in parts))))


@torch.no_grad()
def adapted_draws(
    proxy: Proxy,
    main: ConditionalDensityEstimator,
    theta: Tensor,
    x: Tensor,
    num: int,
    max_rounds: int = _MAX_ROUNDS,
    patience: int = _MAX_ROUNDS,
) -> AdaptedDraws:
    """Draws of a proposal that follows the proxy at its temperature.

    Args:
        proxy: A fitted proxy.
        main: A density estimator of θ given x that covers the proxy's posterior roughly.
        theta: The pairs' own θ, `(B, D)`.
        x: Their observations `(B, *x_shape)`.
        num: Draws per observation and round, at least 4.
        max_rounds: Most rounds of adaptation; with 0, draws are those of main and prior.
        patience: Rounds without progress after which an observation is left as it is.
    """
    drawn, log_m, log_prior = defensive_draws(proxy, main, x, num, theta)
    draws = AdaptedDraws.of(proxy, drawn, x, log_m, log_prior)
    log_w = draws.log_weights(proxy.inverse_temperature)  # row 0: the pair's own θ
    rows = torch.arange(len(x), device=x.device)  # pairs that are not settled yet
    # Rounds in which enough draws were effective, rounds without progress, and the best share.
    good, stale, best = torch.zeros(3, len(x), device=x.device)
    for _ in range(max_rounds):  # mutant: normaliser-one-round
        share = effective_sample_size(log_w[1:, rows]) / num
        good[rows] += share >= _ENOUGH
        stale[rows] = torch.where(share > _PROGRESS * best[rows], 0.0, stale[rows] + 1)
        best[rows] = torch.maximum(best[rows], share)
        unsettled = (share < _PLENTY) & (good[rows] < _GOOD_ROUNDS)
        unsettled &= stale[rows] < patience  # mutant: adapted-without-progress
        if not bool(unsettled.any()):
            break
        rows, drawn = rows[unsettled], drawn[:, unsettled]
        weighted = WeightedDraws.of(drawn[1:], _annealed(log_w[1:, rows]))
        kernels = Kernels.moments(weighted), Kernels.about(weighted)
        drawn, *densities = _next_round(proxy, main, theta[rows], x[rows], num, kernels)
        draws.replace(rows, AdaptedDraws.of(proxy, drawn, x[rows], *densities))
        log_w[:, rows] = draws.log_weights(proxy.inverse_temperature)[:, rows]
    return draws


def _next_round(
    proxy: Proxy,
    main: ConditionalDensityEstimator,
    theta: Tensor,
    x: Tensor,
    num: int,
    kernels: tuple[Kernels, Kernels],
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs' own θ and draws of the adapted proposal `(1 + num, B, D)`, log m and log p(θ)."""
    third = num // 3
    defensive, _, _ = defensive_draws(proxy, main, x, num - 2 * third)
    drawn = torch.cat([theta.unsqueeze(0), defensive, *(part.sample(third) for part in kernels)])
    log_m, log_prior = defensive_log_density(proxy, main, drawn, x)
    densities = [log_m, *(part.log_prob(drawn) for part in kernels)]
    sizes = torch.tensor([num - 2 * third, third, third]).to(drawn)
    shares = (sizes / num).log().reshape(-1, 1, 1)
    return drawn, torch.logsumexp(torch.stack(densities) + shares, dim=0), log_prior


def _annealed(log_weights: Tensor) -> Tensor:
    """τ log w, with the largest τ ≤ 1 at which a fifth of the draws `(K, B)` is effective."""
    log_weights = log_weights.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    enough = _ENOUGH * len(log_weights)
    power = torch.full_like(log_weights[0], float(_POWERS[-1]))
    for candidate in _POWERS.flip(0):
        sizes = effective_sample_size(float(candidate) * log_weights)
        power = torch.where(sizes >= enough, float(candidate), power)
    return power * log_weights

r"""Main and proxy evaluated on the same held-out simulations, in the same units.

First round: F_val = −log p_φ(θ|x), and for the proxy P_val = −log q̃_ψ(θ, x) + log Ẑ_ψ(x), with
Ẑ by adaptive importance sampling that starts from main (¾) and prior (¼).

Later rounds: the pairs come from a proposal, under which −log p_φ is not a proper score. Main and
proxy are then evaluated as classifiers of the true θ among the round's other θ (the atomic loss of
Greenberg et al. 2019, arXiv 1905.07488), in which proposal and partition function cancel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.diagnostics.calibration import (
    CoverageCurve,
    PairDraws,
    coverage_curve,
    hpd_ranks,
    inside_prior,
)
from sbi_jeffreys.networks.embedding import embedded_once
from sbi_jeffreys.objective import (
    forward_term,
    log_normaliser,
    ranking_nce_losses,
    with_contrasts,
)
from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.proxies.normaliser import AdaptedDraws, adapted_draws
from sbi_jeffreys.training.temperature import Evidence, as_evidence, inverse_temperature

__all__ = ["HeldOut"]

_EVALUATIONS = 12_800  # evaluations of the proxy, shared between held-out pairs
_COVERAGE_DRAWS = 200  # draws per held-out pair
_ACCEPTANCE_DRAWS, _FEWEST_DRAWS = 500, 50  # most and fewest draws per held-out pair
_ALL_ACCEPTANCE_DRAWS = 100_000  # draws of all pairs together, within these bounds
# Draws that count as inside; where so many are expected, none is inside with probability e⁻⁵.
_LEAST_INSIDE = 5
_ROWS = 25  # held-out pairs per network call where each has many θ: bounds memory
_AT_ONCE = 200  # held-out pairs per call where each has its own θ, and at most 50 others


@dataclass
class HeldOut:
    """Held-out pairs and how to score a model on them.

    Attributes:
        theta: Parameters `(M, D)`.
        x: Simulations `(M, *x_shape)`.
        weights: Calibration-kernel weights `(M,)` with mean one, ones without kernel; all zero
            where the kernel excludes every pair.
        atomic: Whether the pairs come from a proposal.
    """

    theta: Tensor
    x: Tensor
    weights: Tensor
    atomic: bool = False

    @property
    def excluded(self) -> bool:
        """Whether the kernel excludes every pair."""
        return not bool((self.weights > 0).any())

    def mean(self, losses: Tensor) -> float:
        """Mean of losses `(M,)`, weighted by the kernel; inf where it is not finite."""
        value = float(forward_term(-losses, self.weights))
        return value if math.isfinite(value) and not self.excluded else math.inf

    @torch.no_grad()
    def main_losses(self, main: ConditionalDensityEstimator, proxy: Proxy | None = None) -> Tensor:
        """Loss of the main at each pair, `(M,)`; the atomic loss takes the prior from the proxy."""
        if not self.atomic or proxy is None:
            # mutant: all-pairs-embedded-at-once
            pairs = zip(self.theta.split(_AT_ONCE), self.x.split(_AT_ONCE))
            return torch.cat([-main.log_prob(theta.unsqueeze(0), x)[0] for theta, x in pairs])
        parts = []
        for theta, x in zip(
            with_contrasts(self.theta).split(_AT_ONCE, dim=1), self.x.split(_AT_ONCE)
        ):
            with embedded_once(main, x):
                parts.append(main.log_prob(theta, x) - proxy.log_prior(theta))
        ratio = torch.cat(parts, dim=1)
        return ranking_nce_losses(ratio[0], ratio[1:])

    @torch.no_grad()
    def truncated_losses(self, main: ConditionalDensityEstimator, prior: Distribution) -> Tensor:
        """Loss of a main cut off at the prior, −log p_φ(θ|x) + log P(θ' inside | x), `(M,)`.

        The second term is estimated by draws. Where none of them is inside, it would be −∞, and a
        main with next to no mass inside would be the best of all. So at least a few draws
        count as inside, which makes the estimate an upper bound on such a pair's loss.
        """
        num = max(_FEWEST_DRAWS, min(_ACCEPTANCE_DRAWS, _ALL_ACCEPTANCE_DRAWS // len(self.theta)))
        inside = []
        for x in self.x.split(_ROWS):
            with embedded_once(main, x):
                drawn = main.sample(torch.Size((num,)), x)
            inside.append(inside_prior(prior, drawn).float().mean(dim=0))
        share = torch.cat(inside)
        share = share.clamp_min(_LEAST_INSIDE / num)  # mutant: no-draw-inside-wins
        return self.main_losses(main) + share.log()  # mutant: leakage-not-corrected

    @torch.no_grad()
    def proxy_losses(
        self, proxy: Proxy, main: ConditionalDensityEstimator, draws: AdaptedDraws | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss of the proxy at each pair, and where it is uncertain, `(M,)` each.

        In a first round, the pessimistic estimate of log Z is used (`proxies.normaliser`). It comes
        from `draws` if they are given.
        """
        if self.atomic:
            theta = with_contrasts(self.theta)
            # mutant: atomic-reading-not-tempered
            factor = proxy.inverse_temperature * proxy.log_factor(theta, self.x)
            losses = ranking_nce_losses(factor[0], factor[1:])
            return losses, torch.zeros_like(losses, dtype=torch.bool)
        draws = self.draws(proxy, main) if draws is None else draws
        gamma = proxy.inverse_temperature
        log_z = draws.log_normaliser(gamma)
        return log_z.pessimistic - draws.log_potential(gamma)[0], log_z.uncertain

    @torch.no_grad()
    def draws(self, proxy: Proxy, main: ConditionalDensityEstimator) -> AdaptedDraws:
        """Draws at each pair from a proposal that follows the proxy at its temperature."""
        num = self._num_draws()
        pairs = zip(self.theta.split(_ROWS), self.x.split(_ROWS))
        return AdaptedDraws.together(
            [adapted_draws(proxy, main, theta, x, num) for theta, x in pairs]
        )

    @torch.no_grad()
    def coverage(self, main: ConditionalDensityEstimator, prior: Distribution) -> CoverageCurve:
        """Coverage of the main's 50 and 90 % HPD regions on these pairs, with a binomial band.

        After a first round only: the pairs have to come from the prior.
        """
        parts = []
        for theta, x in zip(self.theta.split(_ROWS), self.x.split(_ROWS)):
            with embedded_once(main, x):
                drawn = main.sample(torch.Size((_COVERAGE_DRAWS,)), x)
                log_p = main.log_prob(torch.cat([theta.unsqueeze(0), drawn]), x)
            parts.append(
                hpd_ranks(PairDraws(drawn, log_p[1:], log_p[0]), inside_prior(prior, drawn))
            )
        return coverage_curve(torch.cat(parts), (0.5, 0.9))

    def _num_draws(self) -> int:
        """Draws per held-out pair."""
        return max(64, min(256, _EVALUATIONS // len(self.theta)))

    @torch.no_grad()
    def inverse_temperature(
        self,
        proxy: Proxy,
        main: ConditionalDensityEstimator,
        draws: AdaptedDraws | None = None,
    ) -> float:
        """γ by which the proxy's log factor should be scaled; see `training.temperature`.

        The contrasts are `draws`, if they are given.
        """
        if self.atomic:
            theta = with_contrasts(self.theta)
            factor = proxy.log_factor(theta, self.x)
            offset = torch.zeros_like(factor)
            found = Evidence(offset, factor, as_evidence(self.weights))
            return inverse_temperature([found], optimistic=True)
        draws = self.draws(proxy, main) if draws is None else draws
        # mutant: contrasts-of-the-prior-only
        found = Evidence(draws.offset, draws.factor, as_evidence(self.weights))
        return inverse_temperature([found], optimistic=True)

    @torch.no_grad()
    def reverse(
        self, main: ConditionalDensityEstimator, proxy: Proxy, num_samples: int = 8
    ) -> float:
        """R at up to 50 held-out observations, biased low by ~1/K: Ẑ is from the same K samples."""
        x = self.x[:50]
        with embedded_once(main, x):
            theta = main.sample(torch.Size((num_samples,)), x)
            log_p, log_q = main.log_prob(theta, x), proxy.log_potential(theta, x)
        log_z = log_normaliser(log_q, log_p)
        inside = torch.isfinite(log_q)
        ratio = torch.where(inside, log_p - log_q, 0.0).sum(0) / inside.sum(0).clamp_min(1)
        values = ratio + log_z
        return float(values[torch.isfinite(values)].mean())

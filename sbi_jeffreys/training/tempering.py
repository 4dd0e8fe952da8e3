"""Setting a proxy's temperature: the evidence for it, and how far a pool can follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.objective import effective_sample_size
from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.proxies.normaliser import AdaptedDraws, adapted_draws
from sbi_jeffreys.training.data import Simulations
from sbi_jeffreys.training.held_out import HeldOut
from sbi_jeffreys.training.temperature import Evidence, as_evidence

__all__ = ["evidence_of", "temper"]

_PROBE, _LEAST_SHARE = 2_000, 0.5  # pairs at which a temperature is tried, effective share to keep
_NEXT_TO_ONE = 0.02  # of γ − 1, which is as good as 0
# The same of a mixture of fits: weighting its pool takes up to a fifth of training.
_NOT_WORTH_IT = 0.05
# Contrasts of each cross-fitted pair, and rounds in which their proposal is adapted: fewer than at
# the held-out pairs, since there are nine times as many pairs, and all contrasts are evidence.
_CONTRASTS, _ROUNDS = 64, 4


@torch.no_grad()
def evidence_of(
    folds: Sequence[tuple[Tensor, Proxy]],
    main: ConditionalDensityEstimator,
    simulations: Simulations,
    kernel: Callable[[Tensor], Tensor],
) -> Evidence | None:
    """The training pairs of every fold with contrasts, under the proxy that has not seen them.

    Args:
        folds: Indices of each fold's pairs, and the proxy that was fitted without them.
        main: The main after stage 0, from which the proposal of the contrasts starts.
        simulations: Those that the proxy was fitted to, of a first round.
        kernel: Calibration kernel, which weighs the pairs.

    Returns:
        None without folds, where a proxy of this kind is not tempered, or without any weight.
    """
    if not folds or not folds[0][1].can_be_tempered:
        return None
    parts = []
    for unseen, proxy in folds:
        theta, x = simulations.theta[unseen], simulations.x[unseen]
        draws = adapted_draws(proxy, main, theta, x, _CONTRASTS, max_rounds=_ROUNDS)
        parts.append((draws.offset, draws.factor, kernel(x)))
    offset, factor, weights = (torch.cat(part, dim=-1) for part in zip(*parts))
    return Evidence(offset, factor, as_evidence(weights)) if bool((weights > 0).any()) else None


def temper(
    proxy: Proxy,
    main: ConditionalDensityEstimator,
    held_out: HeldOut,
    draws: AdaptedDraws | None,
    cross_fitted: Evidence | None = None,
) -> None:
    """Set the proxy's temperature by unseen pairs, as far as a pool can be weighted by it."""
    if not proxy.can_be_tempered:  # mutant: given-likelihood-tempered
        return
    gamma = held_out.inverse_temperature(proxy, main, draws, cross_fitted)
    if cross_fitted is not None and abs(gamma - 1) < _NOT_WORTH_IT:
        gamma = 1.0  # mutant: pool-weighted-for-nothing
    if gamma != 1 and proxy.can_sample:
        theta, x = proxy.sample_joint(_PROBE)
        factor = proxy.log_factor(theta.unsqueeze(0), x)[0] if len(x) else x.new_zeros(0)
        # mutant: pool-weights-collapse
        while len(factor) and _share_left(factor, gamma) < _LEAST_SHARE:
            gamma = math.sqrt(gamma) if abs(gamma - 1) > _NEXT_TO_ONE else 1.0
    proxy.inverse_temperature.fill_(gamma)


def _share_left(log_factor: Tensor, gamma: float) -> float:
    """Effective share of pairs, of log factors `(N,)`, under the weights of a temperature."""
    return float(effective_sample_size((gamma - 1) * log_factor)) / len(log_factor)

"""Setting a proxy's temperature: the evidence for it, and how far a pool can be weighted by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.objective import effective_sample_size
from sbi_jeffreys.proxies import LikelihoodProxy, Proxy
from sbi_jeffreys.proxies.cross_fitting import cross_fitted
from sbi_jeffreys.proxies.normaliser import AdaptedDraws, adapted_draws
from sbi_jeffreys.training.data import Simulations
from sbi_jeffreys.training.held_out import HeldOut
from sbi_jeffreys.training.temperature import (
    Evidence,
    as_evidence,
    inverse_temperature,
)

__all__ = ["evidence_of", "set_temperature", "temper"]

_PROBE, _LEAST_SHARE = 2_000, 0.5  # pairs at which a temperature is tried, effective share to keep
_NEXT_TO_ONE = 0.02  # |γ − 1| that is as good as 0
# The same for a γ of cross-fitted pairs: weighting the pool of a mixture of fits takes up to a
# fifth of training.
_NOT_WORTH_IT = 0.05
_AT_ONCE = 50_000  # θ of all pairs per call: bounds memory
_PAIRS = 200  # training pairs that are evidence, of all folds together
# Contrasts of each pair, and rounds in which their proposal is adapted: fewer than at the held-out
# pairs, whose draws also have to estimate log Z.
_CONTRASTS, _ROUNDS = 64, 4
_OF_PRIOR = 2_000  # contrasts that are tried where adapted ones are not enough
_ENOUGH = 16.0  # effective contrasts, in the median over pairs


def set_temperature(
    proxy: Proxy,
    main: ConditionalDensityEstimator,
    simulations: Simulations,
    held_out: HeldOut,
    draws: AdaptedDraws | None,
    kernel: Callable[[Tensor], Tensor],
    max_epochs: int,
    patience: int,
) -> None:
    """Set a proxy's temperature by all pairs that some fit of it has not seen.

    Args:
        proxy: A fitted proxy.
        main: The main after stage 0.
        simulations: Those that the proxy was fitted to.
        held_out: The held-out pairs.
        draws: Draws at the held-out pairs, if there are some already.
        kernel: Calibration kernel, which weighs the pairs.
        max_epochs: Bound on the epochs of fits that are made to judge the proxy.
        patience: Epochs without improvement before such a fit stops.
    """
    folds: list[tuple[Tensor, LikelihoodProxy]] = []
    made_to_judge = False
    if isinstance(proxy, LikelihoodProxy) and proxy.can_be_tempered and not held_out.atomic:
        config = proxy.config.at_most(max_epochs, patience)
        train, _ = simulations.for_fit()
        made_to_judge = proxy.folds_for(len(train)) == 1
        folds = cross_fitted(proxy, simulations.theta, simulations.x, train, config)
    # mutant: temperature-of-held-out-pairs-alone
    evidence = evidence_of(folds, main, simulations, kernel)
    temper(proxy, main, held_out, draws, evidence, made_to_judge)


@torch.no_grad()
def evidence_of(
    folds: Sequence[tuple[Tensor, Proxy]],
    main: ConditionalDensityEstimator,
    simulations: Simulations,
    kernel: Callable[[Tensor], Tensor],
) -> list[Evidence]:
    """Training pairs of every fold with contrasts, under the proxy that has not seen them.

    Args:
        folds: Indices of each fold's pairs, and the proxy that was fitted without them.
        main: The main after stage 0, from which the proposal of the contrasts starts.
        simulations: Those that the proxy was fitted to, of a first round.
        kernel: Calibration kernel, which weighs the pairs.

    Returns:
        One per fold; empty without folds, or without any weight.
    """
    evidence = []
    for unseen, proxy in folds:
        unseen = unseen[: math.ceil(_PAIRS / len(folds))]  # a fold is in random order
        theta, x = simulations.theta[unseen], simulations.x[unseen]
        weights = kernel(x)
        if bool((weights > 0).any()):
            contrasts = _contrasts(proxy, main, theta, x)
            evidence.append(Evidence(*contrasts, as_evidence(weights)))
    return evidence


def _contrasts(
    proxy: Proxy, main: ConditionalDensityEstimator, theta: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """log p(θ) − log m(θ|x) and f_ψ of the pairs' own θ and of contrasts, `(1 + K, M)` each.

    Contrasts that all lie far from the posterior show only how the proxy falls off there, which
    says little about its width: the more contrasts are effective, the better.
    """
    draws = adapted_draws(proxy, main, theta, x, _CONTRASTS, max_rounds=_ROUNDS)
    adapted = effective_sample_size(draws.log_weights(1.0)[1:]).median()
    if adapted >= _ENOUGH:  # mutant: contrasts-far-away
        return draws.offset, draws.factor
    drawn = proxy.sample_prior(_OF_PRIOR).to(theta).unsqueeze(1)
    parts = [
        proxy.log_factor(part.expand(-1, len(x), -1), x)
        for part in [theta.unsqueeze(0), *drawn.split(max(1, _AT_ONCE // len(x)))]
    ]
    factor = torch.cat(parts)
    if effective_sample_size(factor[1:]).median() <= adapted:
        return draws.offset, draws.factor
    return torch.zeros_like(factor), factor


def temper(
    proxy: Proxy,
    main: ConditionalDensityEstimator,
    held_out: HeldOut,
    draws: AdaptedDraws | None,
    cross_fitted: Sequence[Evidence] = (),
    made_to_judge: bool = False,
) -> None:
    """Set the proxy's temperature by unseen pairs, as far as a pool can be weighted by it.

    Args:
        proxy: A fitted proxy.
        main: The main after stage 0.
        held_out: The held-out pairs.
        draws: Draws at the held-out pairs, if there are some already.
        cross_fitted: Further pairs, under fits that have not seen them.
        made_to_judge: Whether these fits were made only to judge the proxy, and are not its own.
            Since such fits had fewer pairs, they count only where they say that the proxy is too
            narrow.
    """
    if not proxy.can_be_tempered:  # mutant: given-likelihood-tempered
        return
    # mutant: unseen-training-pairs-no-evidence
    gamma = inverse_temperature(cross_fitted) if cross_fitted else 1.0
    if abs(gamma - 1) < _NOT_WORTH_IT:
        gamma = 1.0  # mutant: pool-weighted-for-nothing
    # mutant: judged-too-wide
    if not cross_fitted or (made_to_judge and gamma >= 1):
        gamma = held_out.inverse_temperature(proxy, main, draws)
    if gamma != 1 and proxy.can_sample:
        theta, x = proxy.sample_joint(_PROBE)
        factor = proxy.log_factor(theta.unsqueeze(0), x)[0] if len(x) else x.new_zeros(0)
        # mutant: pool-weights-collapse
        while len(factor) and _share_left(factor, gamma) < _LEAST_SHARE:
            gamma = math.sqrt(gamma) if abs(gamma - 1) > _NEXT_TO_ONE else 1.0
        if cross_fitted and not made_to_judge and abs(gamma - 1) < _NOT_WORTH_IT:
            gamma = 1.0  # mutant: weighted-for-nothing-after-all
    proxy.inverse_temperature.fill_(gamma)


def _share_left(log_factor: Tensor, gamma: float) -> float:
    """Effective share of pairs, of log factors `(N,)`, under the weights of a temperature."""
    return float(effective_sample_size((gamma - 1) * log_factor)) / len(log_factor)

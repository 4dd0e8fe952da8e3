"""Which experts of a likelihood proxy are worth fitting, and in what order.

Experts in closed form come first, then other inexpensive ones, then flows: one flow of x and one of
a regression's residuals, then the rest of their architecture, then others. Flows of one
architecture are fitted together, to all folds at once. The flows that are left are not fitted where
an inexpensive expert predicts held-out x clearly better than the flows of x do, and a flow around a
regression does not improve on that expert: more flows would cost time and get no weight. A flow
that is fitted alone is abandoned where it falls far behind an earlier one of the same kind. Where
outputs have atoms, such as exact zeros, spline flows come before smooth ones, whose failure there
says nothing about splines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sbi_jeffreys.networks.fitting import FitConfig, FitResult
from sbi_jeffreys.proxies.experts.base import (
    Expert,
    ExpertData,
    FittedExpert,
    NetworkExpert,
    OnEpoch,
    fit_networks,
    scales_of,
)
from sbi_jeffreys.proxies.experts.regression import CLEARLY, paired_gain

__all__ = ["fit_experts", "fit_to", "fit_to_folds"]

#: The experts fitted so far to one part of the data.
Fits = dict[Expert, FittedExpert]


def fit_experts(
    specs: Sequence[Expert],
    config: FitConfig,
    z: Tensor,
    x: Tensor,
    train: Tensor,
    val: Tensor,
    on_epoch: OnEpoch = None,
) -> list[FittedExpert]:
    """Fit the inexpensive experts, then flows until they are clearly beaten.

    Args:
        specs: What to fit, flows in this order.
        config: How networks are fitted; an expert's own learning rate and decay take precedence.
        z: Transformed parameters `(N, D)`.
        x: Simulations `(N, dim_x)`.
        train: Indices of training pairs.
        val: Indices of held-out pairs.
        on_epoch: Called after every epoch of a network.

    Returns:
        The experts fitted, at least one.
    """
    data = ExpertData(z, x, train, val, config, scales_of(x[train]), on_epoch)
    return fit_to(specs, data)


def fit_to(specs: Sequence[Expert], data: ExpertData) -> list[FittedExpert]:
    """As `fit_experts`, on given scales of x."""
    (fitted,) = fit_to_folds(specs, [data])
    return list(fitted.values())


def fit_to_folds(specs: Sequence[Expert], folds: Sequence[ExpertData]) -> list[Fits]:
    """As `fit_experts`, to several parts of the same data, on the same scales of x.

    Args:
        specs: What to fit, flows in this order.
        folds: The parts.

    Returns:
        The experts fitted to each part, the same ones everywhere.
    """
    chosen, plain = folds[0].scales
    if chosen.kinds == plain.kinds:
        specs = list(dict.fromkeys(spec.on_one_scale() for spec in specs))
    suitable = [spec for spec in specs if all(spec.suits(data) for data in folds)] or list(specs)
    suitable.sort(key=lambda spec: not spec.closed_form)
    fits: list[Fits] = [{} for _ in folds]
    for spec in suitable:
        if not spec.expensive:
            _fit([spec], folds, fits)
    pending = [spec for spec in suitable if spec.expensive]
    if chosen.atoms.some:  # mutant: atoms-judged-by-smooth-flows
        pending.sort(key=lambda spec: not spec.suits_atoms)
    while pending and not inexpensive_won(_pooled(fits)):  # mutant: regressions-never-win
        wave = _next_wave(pending, fits[0])
        _fit(wave, folds, fits)
        pending = [spec for spec in pending if spec not in wave]
    return _distinct(fits)


def _distinct(fits: list[Fits]) -> list[Fits]:
    """The experts without those whose nets are those of an earlier one: mixtures of one part."""
    nets: dict[tuple[int, ...], Expert] = {}
    for spec in fits[0]:
        nets.setdefault(tuple(id(fitted[spec].net) for fitted in fits), spec)
    # mutant: the-same-expert-twice
    return [{spec: fitted[spec] for spec in nets.values()} for fitted in fits]


def _next_wave(pending: Sequence[Expert], fitted: Fits) -> list[Expert]:
    """The flows to fit next: of one architecture; the first of each kind before all others."""
    alike = [spec for spec in pending if spec.architecture == pending[0].architecture]
    if pending[0].architecture is None:
        alike = alike[:1]
    known = {spec.around_regression for spec in fitted if spec.expensive}
    first = {spec.around_regression: spec for spec in reversed(alike)}
    new = [s for s in alike if s == first[s.around_regression] and s.around_regression not in known]
    return new or alike


def _fit(specs: Sequence[Expert], folds: Sequence[ExpertData], fits: Sequence[Fits]) -> None:
    """Fit one expert, or networks of one architecture, to every fold, and add them to `fits`."""
    if not isinstance(specs[0], NetworkExpert):
        for data, fitted in zip(folds, fits):
            fitted[specs[0]] = specs[0].fit(data, list(fitted.values()), math.inf)
        return
    together = specs[0].architecture is not None
    pairs = [(spec, data, fitted) for spec in specs for data, fitted in zip(folds, fits)]
    prepared = [
        spec.prepare(data, list(fitted.values()), _threshold(spec, fitted, together))
        for spec, data, fitted in pairs
        if isinstance(spec, NetworkExpert)
    ]
    experts = fit_networks(prepared, folds[0].on_epoch, together)
    for (spec, _, fitted), expert in zip(pairs, experts):
        fitted[spec] = expert


def _threshold(spec: Expert, fitted: Fits, together: bool) -> float:
    """The loss after twenty epochs above which a fit is abandoned, by its best rival so far.

    A network that is fitted together with others is not abandoned: it costs little more, and with
    strong weight decay it learns late.
    """
    if together:  # mutant: late-learners-abandoned
        return math.inf
    results = [
        expert.result
        for other, expert in fitted.items()
        if other.expensive and other.around_regression == spec.around_regression
    ]
    # mutant: races-the-last-of-its-like
    best = min(results, key=lambda result: result.early, default=FitResult(math.inf, 0))
    return best.abandon_threshold


def _pooled(fits: Sequence[Fits]) -> list[tuple[Expert, Tensor]]:
    """Every expert's log densities of the held-out pairs of all folds."""
    specs = list(fits[0])
    return [(spec, torch.cat([fitted[spec].held_out for fitted in fits])) for spec in specs]


def inexpensive_won(scores: Sequence[tuple[Expert, Tensor]]) -> bool:
    """Whether an inexpensive expert clearly beats every flow of x itself.

    No flow of residuals may clearly beat that expert either, and flows of both kinds must have been
    fitted. A failed fit, whose gain is NaN, decides nothing.

    Args:
        scores: Experts and their log densities of held-out pairs, `(M,)`.
    """
    flows: dict[bool, list[Tensor]] = {True: [], False: []}  # keys: whether around a regression
    for spec, score in scores:
        if spec.expensive:
            flows[spec.around_regression].append(score)
    if not all(flows.values()):
        return False
    return any(
        all(paired_gain(score, other) > CLEARLY for other in flows[False])
        and all(paired_gain(score, other) > -CLEARLY for other in flows[True])
        for spec, score in scores
        if not spec.expensive
    )

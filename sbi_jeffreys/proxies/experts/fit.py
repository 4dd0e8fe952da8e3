"""Which experts of a likelihood proxy are worth fitting, and in what order.

Experts in closed form come first, then other inexpensive ones, then one flow after the other. A
flow's fit is abandoned where it falls far behind those of its like. The flows that are left are not
fitted where an inexpensive expert predicts held-out x clearly better than the flows of x do, and a
flow around a regression does not improve on it: they would cost time and get no weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from sbi_jeffreys.networks.fitting import FitConfig, FitResult
from sbi_jeffreys.networks.transforms import MarginalTransform
from sbi_jeffreys.proxies.experts.base import Expert, ExpertData, FittedExpert, OnEpoch, scales_of
from sbi_jeffreys.proxies.experts.regression import CLEARLY, paired_gain

__all__ = ["fit_experts"]


def fit_experts(
    specs: Sequence[Expert],
    config: FitConfig,
    z: Tensor,
    x: Tensor,
    train: Tensor,
    val: Tensor,
    on_epoch: OnEpoch = None,
    scales: tuple[MarginalTransform, MarginalTransform] | None = None,
    stop: bool = True,
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
        scales: As from `scales_of`; None: those of the training pairs.
        stop: Whether to skip the flows that are left once an inexpensive expert has won.

    Returns:
        The experts fitted, at least one.
    """
    chosen, plain = scales_of(x[train]) if scales is None else scales
    data = ExpertData(z, x, train, val, config, (chosen, plain), on_epoch)
    if chosen.kinds == plain.kinds:
        specs = list(dict.fromkeys(spec.on_one_scale() for spec in specs))
    suitable = [spec for spec in specs if spec.suits(data)] or list(specs)
    suitable.sort(key=lambda spec: not spec.closed_form)
    fitted: list[FittedExpert] = []
    for spec in suitable:
        if not spec.expensive:
            fitted.append(spec.fit(data, fitted, math.inf))
    # The best after twenty epochs so far, of flows around a regression and of the others.
    rivals = {True: FitResult(math.inf, 0), False: FitResult(math.inf, 0)}
    for spec in (spec for spec in suitable if spec.expensive):
        rival = rivals[spec.around_regression]
        expert = spec.fit(data, fitted, rival.abandon_threshold)
        if expert.result.early < rival.early:  # mutant: races-the-last-of-its-like
            rivals[spec.around_regression] = expert.result
        fitted.append(expert)
        if stop and inexpensive_won(fitted):  # mutant: regressions-never-win
            break
    return fitted


def inexpensive_won(fitted: Sequence[FittedExpert]) -> bool:
    """Whether an inexpensive expert clearly beats every flow of x itself.

    No flow of residuals may clearly beat that expert either, and flows of both kinds must have been
    fitted. A failed fit, whose gain is NaN, decides nothing.
    """
    flows: dict[bool, list[Tensor]] = {True: [], False: []}  # by whether around a regression
    for expert in fitted:
        if expert.spec.expensive:
            flows[expert.spec.around_regression].append(expert.held_out)
    if not all(flows.values()):
        return False
    return any(
        all(paired_gain(expert.held_out, other) > CLEARLY for other in flows[False])
        and all(paired_gain(expert.held_out, other) > -CLEARLY for other in flows[True])
        for expert in fitted
        if not expert.spec.expensive
    )

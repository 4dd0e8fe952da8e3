"""Which experts of a likelihood proxy are worth fitting, and in what order.

Experts in closed form come first. Then one network after the other is fitted. A fit is abandoned
where it falls far behind those of its like. The networks that are left are not fitted where an
expert in closed form predicts held-out x clearly better than the networks of x do, and a network of
its residuals does not improve on it: they would cost time and get no weight.
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
    """Fit the experts in closed form, then networks until they are clearly beaten.

    Args:
        specs: What to fit, networks in this order.
        config: How networks are fitted; an expert's own learning rate and decay take precedence.
        z: Transformed parameters `(N, D)`.
        x: Simulations `(N, dim_x)`.
        train: Indices of training pairs.
        val: Indices of held-out pairs.
        on_epoch: Called after every epoch of a network.
        scales: As from `scales_of`; None: those of the training pairs.
        stop: Whether to skip the networks that are left once an expert in closed form has won.

    Returns:
        The experts fitted, at least one.
    """
    chosen, plain = scales_of(x[train]) if scales is None else scales
    data = ExpertData(z, x, train, val, config, (chosen, plain), on_epoch)
    if chosen.kinds == plain.kinds:
        specs = list(dict.fromkeys(spec.on_one_scale() for spec in specs))
    networks = [spec for spec in specs if not spec.closed_form]
    fitted: list[FittedExpert] = []
    for spec in specs:
        if spec.closed_form and (spec.has_enough_pairs(data) or not networks):
            fitted.append(spec.fit(data, fitted, math.inf))
    # The best after twenty epochs so far, of networks around a regression and of the others.
    rivals = {True: FitResult(math.inf, 0), False: FitResult(math.inf, 0)}
    for spec in networks:
        rival = rivals[spec.around_regression]
        expert = spec.fit(data, fitted, rival.abandon_threshold)
        if expert.result.early < rival.early:  # mutant: races-the-last-of-its-like
            rivals[spec.around_regression] = expert.result
        fitted.append(expert)
        if stop and closed_form_won(fitted):  # mutant: regressions-never-win
            break
    return fitted


def closed_form_won(fitted: Sequence[FittedExpert]) -> bool:
    """Whether an expert in closed form clearly beats every network of x itself.

    No network of residuals may clearly beat that expert either, and networks of both kinds must
    have been fitted. A failed fit, whose gain is NaN, decides nothing.
    """
    networks: dict[bool, list[Tensor]] = {True: [], False: []}  # by whether around a regression
    for expert in fitted:
        if not expert.spec.closed_form:
            networks[expert.spec.around_regression].append(expert.held_out)
    if not all(networks.values()):
        return False
    return any(
        all(paired_gain(expert.held_out, other) > CLEARLY for other in networks[False])
        and all(paired_gain(expert.held_out, other) > -CLEARLY for other in networks[True])
        for expert in fitted
        if expert.spec.closed_form
    )

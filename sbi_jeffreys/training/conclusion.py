"""From the state of a training to its report and to the trainer's summary."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from sbi_jeffreys import _sbi
from sbi_jeffreys._checks import warn
from sbi_jeffreys._sbi import NPE
from sbi_jeffreys.diagnostics.calibration import CoverageCurve
from sbi_jeffreys.proxies import LikelihoodProxy, PooledProxy, Proxy
from sbi_jeffreys.training.own_space import KeptPlain
from sbi_jeffreys.training.preparation import Prepared
from sbi_jeffreys.training.report import (
    REFUSED,
    Estimate,
    Kept,
    Problem,
    ProxyStatus,
    Space,
    StageStatus,
    TrainingReport,
)
from sbi_jeffreys.training.stage import APART
from sbi_jeffreys.training.symmetric import TRACES, SymmetricTraining

__all__ = ["announce", "complete_summary", "make_report"]

_GAP = 0.5  # nats by which a main may be behind its proxy
_CLEARLY = 2.0  # standard errors that the gap must exceed as well


def make_report(
    prepared: Prepared | None,
    symmetric: SymmetricTraining | None,
    seconds: Sequence[float],
    kept_plain: KeptPlain | None = None,
) -> TrainingReport:
    """The report of a training.

    Args:
        prepared: The proxy, None where none was asked for.
        symmetric: The symmetric stage, where there is one.
        seconds: Wall time of plain NPE, of the proxy, and of the symmetric stage.
        kept_plain: The plain NPE that is the result, where there were two to choose from.
    """
    prepared = prepared or Prepared(ProxyStatus.NOT_FITTED, None, "none asked for")
    proxy, proxy_losses = prepared.proxy, prepared.proxy_losses
    main_losses = None if symmetric is None else symmetric.best.losses
    if symmetric is not None and symmetric.proxy_losses is not None:
        proxy_losses = symmetric.proxy_losses
    coverage = None if symmetric is None else symmetric.coverage_after
    main = _estimate(main_losses, prepared.weights)
    if kept_plain is not None and kept_plain.choice.kept is Space.OWN:
        main_losses, coverage, main = kept_plain.losses, kept_plain.coverage, kept_plain.choice.own
    gap = None
    if main_losses is not None and proxy_losses is not None:
        gap = Estimate.of(main_losses - proxy_losses, prepared.weights)  # mutant: gap-not-weighted
    stage = None if symmetric is None else symmetric.stage
    return TrainingReport(
        proxy_status=prepared.status,
        proxy=prepared.note,
        experts=_experts(proxy),
        trust=prepared.trust,
        inverse_temperature=1.0 if proxy is None else float(proxy.inverse_temperature),
        stage_status=StageStatus.NOT_RUN if symmetric is None else symmetric.status,
        kept=Kept.PLAIN_NPE if symmetric is None else symmetric.best.kept,
        npe=_estimate(prepared.main_losses, prepared.weights),
        proxy_held_out=_estimate(proxy_losses, prepared.weights),
        uncertain=prepared.uncertain,
        coverage_before=None if symmetric is None else symmetric.coverage_before,
        coverage=coverage,
        space=None if kept_plain is None else kept_plain.choice,
        main=main,
        gap=gap,
        multiplier=None if stage is None else float(stage.multipliers.multipliers[0]),
        apart=None if stage is None else stage.latest["reverse"],
        skipped_steps=0 if stage is None else stage.skipped,
        restarts=0 if symmetric is None else symmetric.restarts,
        seconds=(seconds[0], seconds[1], seconds[2]),
        problems=tuple(_problems(prepared.status, symmetric, gap, coverage)),
        atomic=prepared.atomic,
    )


def complete_summary(trainer: NPE, epochs: int, plain: bool, best: float) -> None:
    """Add the symmetric stage to the trainer's `summary`, and log it.

    Args:
        trainer: The trainer.
        epochs: Epochs of the symmetric stage in this call of `train`.
        plain: Whether plain NPE was trained in this call, so that sbi has made its entries.
        best: Held-out value of the weights kept.
    """
    summary, tracker = trainer.summary, _sbi.tracker_of(trainer)
    totals = {"epochs_trained": epochs, "best_validation_loss": best}
    if plain:
        totals["epochs_trained"] += summary["epochs_trained"].pop()
        summary["best_validation_loss"].pop()
    for name, value in totals.items():
        summary[name].append(value)
        tracker.log_metric(name=name, value=value, step=_sbi.latest_round(trainer) + 1)
    for name in (*TRACES, "validation_loss", "training_loss", "epoch_durations_sec"):
        first = len(summary[name]) - epochs
        for step, value in enumerate(summary[name][first:], start=first):
            tracker.log_metric(name=name, value=value, step=step)
    tracker.flush()


def announce(
    report: TrainingReport, trainer: NPE, show_train_summary: bool, show_progress_bars: bool
) -> None:
    """Print a report, and warn the caller of `train` of what is not as the method promises."""
    if show_train_summary:
        print(_sbi.describe_round(trainer))
    if show_progress_bars or show_train_summary:
        print(f"\n{report}")
    for problem in report.problems:
        warn(report.describe(problem))


def _estimate(losses: Tensor | None, weights: Tensor | None) -> Estimate | None:
    return None if losses is None else Estimate.of(losses, weights)


def _experts(proxy: Proxy | None) -> tuple[tuple[str, float], ...]:
    """Names of a proxy's parts, with their powers or the sums of their weights, largest first."""
    if isinstance(proxy, PooledProxy):
        likelihood, energy = proxy.powers.tolist()
        parts = {"energy": energy, "likelihood of summaries": likelihood}
        return tuple(sorted(parts.items(), key=lambda item: -item[1]))
    if not isinstance(proxy, LikelihoodProxy):
        return ()
    weights: dict[str, float] = {}
    for expert, weight in zip(proxy.fitted, proxy.weights.tolist()):
        name = str(expert.spec.name)  # type: ignore[union-attr]
        weights[name] = weights.get(name, 0.0) + weight
    return tuple(sorted(weights.items(), key=lambda item: -item[1]))


def _covers_less(before: CoverageCurve | None, after: CoverageCurve | None) -> bool:
    """Whether a region covers less than before, and less than an exact posterior's 99 % band."""
    if before is None or after is None:
        return False
    low = after.values < after.lower.to(after.values)
    return bool((low & (after.values < before.values)).any())


def _problems(
    status: ProxyStatus,
    symmetric: SymmetricTraining | None,
    gap: Estimate | None,
    coverage: CoverageCurve | None,
) -> list[Problem]:
    """The problems of a training: those of the proxy, of the stage, and of the main."""
    found = []
    if status is ProxyStatus.ABSENT:
        found.append(Problem.NO_PROXY)
    if status is ProxyStatus.NO_KERNEL_WEIGHT:
        found.append(Problem.KERNEL)
    elif status in REFUSED:
        found.append(Problem.PROXY_REFUSED)
    if symmetric is None:
        return found
    stage = symmetric.stage
    if symmetric.status is StageStatus.PAUSED:
        found.append(Problem.STAGE_PAUSED)
    elif symmetric.status is StageStatus.STOPPED:
        found.append(Problem.STAGE_STOPPED)
    else:
        behind = gap is not None and math.isfinite(gap.value) and gap.value > _GAP
        if behind and gap is not None and gap.value > _CLEARLY * gap.error:
            found.append(Problem.MAIN_BEHIND_PROXY)
        elif stage.at_bound and stage.options.adaptive and symmetric.always_at_bound:
            found.append(Problem.MULTIPLIER_AT_BOUND)
        elif stage.latest["reverse"] > APART:  # mutant: apart-in-silence
            found.append(Problem.MAIN_APART)
    if _covers_less(symmetric.coverage_before, coverage):
        found.append(Problem.COVERS_LESS)
    if stage.skipped:
        found.append(Problem.STEPS_SKIPPED)
    return found

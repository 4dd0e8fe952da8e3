"""What a trainer is and what state it is in, in one to three lines: its `repr`."""

from __future__ import annotations

from typing import Any

from sbi_jeffreys import _sbi
from sbi_jeffreys._sbi import NPE
from sbi_jeffreys.networks.builders import MainBuilder
from sbi_jeffreys.training.report import TrainingReport
from sbi_jeffreys.training.training import Training

__all__ = ["describe"]


def describe(trainer: NPE, training: Training, builder: Any) -> str:
    """The trainer's main, its simulations, and what the last training left.

    Args:
        trainer: The trainer.
        training: Its record of the symmetric part.
        builder: Builder of the main; None if it was lost in a pickle.
    """
    rounds = _sbi.latest_round(trainer) + 1
    num = len(trainer.get_simulations()[0]) if rounds else 0
    head = f"{type(trainer).__name__} with main {_name_of(builder)}"
    if not num:
        return f"{head}, without simulations, not trained"
    head += f", {num:,} simulations in {rounds} round{'s' * (rounds > 1)}"
    report, main = training.report, _sbi.network_of(trainer)
    if main is None:
        return f"{head}, not trained"
    if report is None:
        return f"{head}, with a main that was loaded, or whose training has not ended"
    newer = num - (training.available or num)
    state = f"trained before the last {newer:,} were appended" if newer > 0 else "trained"
    return "\n".join([f"{head}, {state}", *_outcome(report)])


def _name_of(builder: Any) -> str:
    """What the main is called: sbi's name of the model, or the kind of builder."""
    if builder is None:
        return "of a builder that was not saved"
    if not isinstance(builder, MainBuilder):
        return f"of {getattr(builder, '__qualname__', type(builder).__name__)}"
    model = builder.model
    return repr(model) if isinstance(model, str) else type(model).__name__


def _outcome(report: TrainingReport) -> list[str]:
    """Two lines: the proxy, and the weights that were kept."""
    trust = f" with trust {report.trust:.2f}" if report.proxy_status.name == "USED" else ""
    problems = len(report.problems)
    see = f"; {problems} problem{'s' * (problems > 1)}, see training_report" if problems else ""
    space = f" {report.space.kept.value}" if report.space is not None else ""
    return [
        f"  proxy ({report.proxy}): {report.proxy_status.value}{trust}",
        f"  symmetric stage {report.stage_status.value}; weights kept: {report.kept.value}"
        f"{space}{see}",
    ]

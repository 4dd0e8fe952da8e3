"""The main job: train NPE and NPE_Jeffreys on the same simulations, compare, draw.

`python -m sbi_jeffreys --task two_moons --simulations 1000` prints one table and writes
`posteriors.png` and `training.png`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sbi_jeffreys.benchmark._arguments import add_common, positive_int, task_name
from sbi_jeffreys.benchmark._parallel import warm_up
from sbi_jeffreys.benchmark._running import derive_seed, one_thread, quiet
from sbi_jeffreys.benchmark.evaluation import (
    EvaluationResult,
    EvaluationSettings,
    evaluate,
    references_for,
    simulations_for,
)
from sbi_jeffreys.benchmark.fitted import FittedMethod
from sbi_jeffreys.benchmark.methods import FitContext, get_method
from sbi_jeffreys.benchmark.tasks import get_task
from sbi_jeffreys.diagnostics import plots

__all__ = ["add_arguments", "run"]

_METHODS = ("npe_nsf", "npe_jeffreys", "npe_jeffreys_corrected")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the main job."""
    parser.add_argument(
        "--task", type=task_name, default="two_moons", help="see `tasks` (default: %(default)s)"
    )
    parser.add_argument(
        "--simulations", type=positive_int(20), default=1000, help="budget (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument(
        "--observations", type=positive_int(), default=3, help="to compare at (default: 3)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outputs"), help="folder of the figures (default: outputs)"
    )
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Train, evaluate, print the table, write the figures; the exit code."""
    task = get_task(args.task)
    # A smaller evaluation than the benchmark's: minutes are for training.
    settings = EvaluationSettings(args.observations, num_samples=1000, classifier="rf")
    settings = settings.smoke() if args.fast else settings
    args.out.mkdir(parents=True, exist_ok=True)
    theta, x = simulations_for(task, args.simulations, args.seed)
    context = FitContext(show_progress=not args.quiet, fast=args.fast)
    fits: dict[str, FittedMethod] = {}
    results: dict[str, EvaluationResult] = {}
    with one_thread():
        if not args.fast:
            with quiet():  # else the first method would pay for imports and first calls
                warm_up()
        for name in _METHODS:
            label = get_method(name).label
            _say(f"{label}: training on {args.simulations} simulations …", args.quiet)
            seed = derive_seed("training", task.name, args.simulations, args.seed)
            fits[name] = get_method(name).fit(task, theta, x, seed, context)
            _say(f"{label}: evaluating …", args.quiet)
            results[name] = evaluate(task, fits[name], settings, args.seed)
    print(f"\n{task.name}, {args.simulations} simulations, seed {args.seed}")
    print(format_table(_rows(fits, results)))
    reference = references_for(task, settings)[0]
    samples = [results[name].samples[0] for name in _METHODS[:2]]
    plot_posteriors(reference, samples, args.out / "posteriors.png", task.name)
    summary = context.shared["npe_jeffreys"].inference.summary
    plot_traces(summary, args.out / "training.png")
    print(f"Figures: {args.out / 'posteriors.png'}, {args.out / 'training.png'}")
    return 0


def _say(text: str, silent: bool) -> None:
    if not silent:
        print(text, file=sys.stderr, flush=True)


_COLUMNS = ("method", "C2ST", "NLL", "coverage 90 %", "leakage", "ESS", "seconds")


def _rows(
    fits: dict[str, FittedMethod], results: dict[str, EvaluationResult]
) -> list[tuple[str, ...]]:
    """The table's rows, header first."""
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for name, result in results.items():
        values = result.metrics
        rows.append(
            (
                get_method(name).label,
                _number(values["c2st"], 3),
                _number(values.get("nll"), 3),
                _number(values.get("coverage_90"), 3),
                _number(values.get("leakage"), 3),
                _number(values.get("ess"), 2),
                _number(fits[name].info["seconds"] + result.seconds["sampling"], 1),
            )
        )
    return rows


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, numbers to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def plot_posteriors(reference: Tensor, samples: Sequence[Tensor], path: Path, title: str) -> None:
    """NPE's and NPE_Jeffreys' samples over the reference's, `(N, D)` each, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    axes = plots.plot_posteriors(dict(zip(("NPE", "NPE_Jeffreys"), samples)), reference)
    figure = axes.flat[0].figure
    figure.suptitle(f"{title}: posterior at observation 0")
    _save(figure, path)


def plot_traces(summary: dict[str, Any], path: Path) -> None:
    """Traces of the symmetric stage as a PNG, by `sbi_jeffreys.diagnostics.plots`."""
    import matplotlib

    matplotlib.use("Agg")
    _save(plots.plot_training(summary)[0].figure, path)


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)

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
from sbi_jeffreys.benchmark._running import derive_seed, one_thread, quiet
from sbi_jeffreys.benchmark.cells import check_folder
from sbi_jeffreys.benchmark.evaluation import (
    EvaluationResult,
    EvaluationSettings,
    evaluate,
    references_for,
    simulations_for,
)
from sbi_jeffreys.benchmark.figures import saved
from sbi_jeffreys.benchmark.fitted import FittedMethod
from sbi_jeffreys.benchmark.methods import FitContext, get_method
from sbi_jeffreys.benchmark.runner import warm_up
from sbi_jeffreys.benchmark.tables import plain, shown
from sbi_jeffreys.benchmark.tasks import get_task
from sbi_jeffreys.diagnostics import plots

__all__ = ["add_arguments", "run"]

_METHODS = ("npe_nsf", "npe_jeffreys", "npe_jeffreys_corrected")
#: Metric → title and format.
_COLUMNS = {
    "c2st": ("C2ST", ".3f"),
    "nll": ("NLL", ".3f"),
    "coverage_90": ("coverage 90 %", ".3f"),
    "leakage": ("leakage", ".3f"),
    "ess": ("ESS", ".2f"),
    "seconds": ("seconds", ".1f"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the main job."""
    number = "(default: %(default)s)"
    parser.add_argument("--task", type=task_name, default="two_moons", help=f"see `tasks` {number}")
    text = f"budget {number}"
    parser.add_argument("--simulations", type=positive_int(20), default=1000, help=text)
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    text = "to compare at (default: 3)"
    parser.add_argument("--observations", type=positive_int(), default=3, help=text)
    text = "folder of the figures (default: outputs)"
    parser.add_argument("--out", type=Path, default=Path("outputs"), help=text)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Train, evaluate, print the table, write the figures; the exit code."""
    task = get_task(args.task)
    # A smaller evaluation than the benchmark's: minutes are for training.
    settings = EvaluationSettings(args.observations, num_samples=1000, classifier="rf")
    settings = settings.smoke() if args.fast else settings
    check_folder(args.out)
    theta, x = simulations_for(task, args.simulations, args.seed)
    context = FitContext(show_progress=not args.quiet, fast=args.fast)
    fits: dict[str, FittedMethod] = {}
    results: dict[str, EvaluationResult] = {}
    trained: set[str] = set()
    with one_thread():
        if not args.fast:
            with quiet():  # else the first method would pay for imports and first calls
                warm_up()
        for name in _METHODS:
            method = get_method(name)
            if method.training not in trained:
                _say(f"{method.label}: training on {args.simulations} simulations …", args.quiet)
                trained.add(method.training)
            seed = derive_seed("training", task.name, args.simulations, args.seed)
            fits[name] = method.fit(task, theta, x, seed, context)
            _say(f"{method.label}: evaluating …", args.quiet)
            results[name] = evaluate(task, fits[name], settings, args.seed)
    print(f"\n{task.name}, {args.simulations} simulations, seed {args.seed}")
    print(plain(_rows(fits, results)))
    reference = references_for(task, settings)[0]
    samples = [results[name].samples[0] for name in _METHODS[:2]]
    plot_posteriors(reference, samples, args.out / "posteriors.png", task.name)
    summary = context.shared["npe_jeffreys"].inference.summary
    saved(args.out / "training.png", lambda: plots.plot_training(summary)[0].figure)
    print(f"Figures: {args.out / 'posteriors.png'}, {args.out / 'training.png'}")
    return 0


def _say(text: str, silent: bool) -> None:
    if not silent:
        print(text, file=sys.stderr, flush=True)


def _rows(fits: dict[str, FittedMethod], results: dict[str, EvaluationResult]) -> list[list[str]]:
    """The table's rows, header first."""
    rows = [["method", *(title for title, _ in _COLUMNS.values())]]
    for name, result in results.items():
        seconds = fits[name].info["seconds"] + result.seconds["sampling"]
        values = {**result.metrics, "seconds": seconds}
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        row = [shown(finite.get(key), spec) for key, (_, spec) in _COLUMNS.items()]
        rows.append([get_method(name).label, *row])
    return rows


def plot_posteriors(reference: Tensor, samples: Sequence[Tensor], path: Path, title: str) -> None:
    """NPE's and NPE_Jeffreys' samples over the reference's, `(N, D)` each, as a PNG."""

    def draw() -> Any:
        axes = plots.plot_posteriors(dict(zip(("NPE", "NPE_Jeffreys"), samples)), reference)
        axes.flat[0].figure.suptitle(f"{title}: posterior at observation 0")
        return axes.flat[0].figure

    saved(path, draw)

"""The main job: train NPE and NPE_Jeffreys on the same simulations, compare, draw.

`python -m sbi_jeffreys --task two_moons --simulations 1000` prints one table and writes
`posteriors.png` and `training.png`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sbi_jeffreys.benchmark._arguments import (
    DEFAULT,
    add_common,
    positive_int,
    seed_number,
    task_name,
)
from sbi_jeffreys.benchmark._running import derive_seed, one_thread, quiet, say
from sbi_jeffreys.benchmark.cells import check_folder
from sbi_jeffreys.benchmark.entries import warm_up
from sbi_jeffreys.benchmark.evaluation import (
    EvaluationResult,
    EvaluationSettings,
    evaluate,
    references_for,
    simulations_for,
)
from sbi_jeffreys.benchmark.figures import saved
from sbi_jeffreys.benchmark.methods import FitContext, get_method, proxy_is_usable
from sbi_jeffreys.benchmark.tables import FELL_BACK, plain, shown
from sbi_jeffreys.benchmark.tasks import get_task
from sbi_jeffreys.diagnostics import plots

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
    """Add the options of the main job."""
    text = f"see `tasks` {DEFAULT}"
    parser.add_argument("--task", type=task_name, default="two_moons", help=text)
    text = f"budget {DEFAULT}"
    parser.add_argument("--simulations", type=positive_int(20), default=1000, help=text)
    text = "of everything random (default: 0)"
    parser.add_argument("--seed", type=seed_number, default=0, help=text)
    text = "to compare at (default: 3)"
    parser.add_argument("--observations", type=positive_int(), default=3, help=text)
    text = "folder of the figures (default: outputs)"
    parser.add_argument("--out", type=Path, default=Path("outputs"), help=text)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Train, evaluate, print the table, write the figures; the exit code."""
    task = get_task(args.task)
    # The evaluation is smaller than the benchmark's, so that most of the time goes to training.
    settings = EvaluationSettings(args.observations, num_samples=1000, classifier="rf")
    settings = settings.smoke() if args.fast else settings
    check_folder(args.out)
    theta, x = simulations_for(task, args.simulations, args.seed)
    context = FitContext(show_progress=not args.quiet, fast=args.fast)
    seed = derive_seed("training", task.name, args.simulations, args.seed)
    results: dict[str, EvaluationResult] = {}
    seconds: dict[str, float] = {}
    with one_thread():
        if not args.fast:
            with quiet():  # so that imports and first calls are not charged to the first method
                warm_up()
        for method in map(get_method, _METHODS):
            if (method.training, 0) not in context.shared:
                say(f"{method.label}: training on {args.simulations} simulations …", args.quiet)
            fitted = method.fit(task, theta, x, seed, context)
            say(f"{method.label}: evaluating …", args.quiet)
            label = method.label + (" †" if fitted.info.get("fell_back") else "")
            result = results[label] = evaluate(task, fitted, settings, args.seed)
            seconds[label] = fitted.info["seconds"] + result.seconds["sampling"]
    print(f"\n{task.name}, {args.simulations} simulations, seed {args.seed}")
    print(plain(_rows(results, seconds)))
    inference = context.shared["npe_jeffreys", 0].inference
    print("" if proxy_is_usable(inference) else f"{FELL_BACK}\n")
    print(str(inference.training_report).splitlines()[0])  # which says what became of the proxy
    reference = references_for(task, settings)[0]
    samples = [result.samples[0] for result in results.values()][:2]
    plot_posteriors(reference, samples, args.out / "posteriors.png", task.name)
    saved(args.out / "training.png", lambda: plots.plot_training(inference.summary)[0].figure)
    print(f"Figures: {args.out / 'posteriors.png'}, {args.out / 'training.png'}")
    return 0


def _rows(results: dict[str, EvaluationResult], seconds: dict[str, float]) -> list[list[str]]:
    """The table's rows by label, header first."""
    rows = [["method", *(title for title, _ in _COLUMNS.values())]]
    for label, result in results.items():
        values = {**result.metrics, "seconds": seconds[label]}
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        rows.append([label, *(shown(finite.get(k), spec) for k, (_, spec) in _COLUMNS.items())])
    return rows


def plot_posteriors(reference: Tensor, samples: Sequence[Tensor], path: Path, title: str) -> None:
    """NPE's and NPE_Jeffreys' samples over the reference's, `(N, D)` each, as a PNG."""

    def draw() -> Any:
        axes = plots.plot_posteriors(dict(zip(("NPE", "NPE_Jeffreys"), samples)), reference)
        axes.flat[0].figure.suptitle(f"{title}: posterior at observation 0")
        return axes.flat[0].figure

    saved(path, draw)

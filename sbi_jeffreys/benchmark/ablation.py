"""Ablation: what each part of the symmetric stage contributes, and what a broken proxy does.

A row is a task and a condition of its proxy. Per row and seed, stage 0 and the proxy are trained
once; every variant runs the symmetric stage from there. Two promises are checked per row: adaptive
weights are not worse than the best frozen ones, and not worse than plain NPE.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from sbi_jeffreys.benchmark._arguments import items, positive_int
from sbi_jeffreys.benchmark._running import derive_seed, measured, seeded
from sbi_jeffreys.benchmark.ablation_table import CHECK, NPE, STUDY, write_table
from sbi_jeffreys.benchmark.evaluation import (
    EvaluationSettings,
    evaluate,
    pair_metrics,
    simulations_for,
)
from sbi_jeffreys.benchmark.fitted import EstimatorFit
from sbi_jeffreys.benchmark.methods import FitContext
from sbi_jeffreys.benchmark.runner import (
    Outcome,
    add_run_arguments,
    report_outcome,
    run_entries,
    study_entry,
)
from sbi_jeffreys.benchmark.tasks import TASKS, Task, get_task
from sbi_jeffreys.benchmark.variants import CONDITIONS, VARIANTS, ForkableNPE, Variant
from sbi_jeffreys.training.multipliers import trust

__all__ = ["Row", "add_arguments", "row_list", "run", "run_ablation"]

_DEFAULT_TASKS = "gaussian_linear,two_moons,slcp,sir"
#: Broken proxies that a bare task name brings along.
_BROKEN = {"two_moons": ("shuffled", "undertrained"), "sir": ("raw",)}
_SETTINGS = EvaluationSettings(
    observations=3,
    observation_seed=3,  # the reported benchmark has its own
    num_samples=1000,
    classifier="rf",
    test_pairs=2000,
    draws_per_pair=50,
)


@dataclass(frozen=True)
class Row:
    """A task and a condition of its proxy."""

    task: str
    condition: str = "good"

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"{self.task}:{self.condition}"

    @property
    def variants(self) -> dict[str, Variant]:
        """What is run in this row."""
        good = self.condition == "good"
        return {name: v for name, v in VARIANTS.items() if good or v.broken_rows}


def row_list(text: str) -> list[Row]:
    """Rows, comma-separated: `task` for all rows of a task, `task:proxy` for one of them.

    Raises:
        argparse.ArgumentTypeError: If there is no such row; the message lists the known ones.
    """
    rows: list[Row] = []
    for item in items(text):
        task, colon, condition = item.partition(":")
        if task not in TASKS or (colon and condition not in CONDITIONS):
            raise argparse.ArgumentTypeError(
                f"expected tasks ({', '.join(sorted(TASKS))}) or rows task:proxy with proxy one of "
                f"{', '.join(CONDITIONS)}, comma-separated; got {item!r}"
            )
        names = (condition,) if colon else ("good", *_BROKEN.get(task, ()))
        rows += [Row(task, name) for name in names]
    return list(dict.fromkeys(rows))


def measure_row(
    context: FitContext,
    task: Task,
    row: Row,
    simulations: int,
    seed: int,
    settings: EvaluationSettings,
    with_c2st: bool,
) -> dict[str, Any]:
    """Train stage 0 and the proxy of a row, run all its variants from there, measure each.

    Returns:
        `results`, with `variants`: per name `metrics` and `training`; `proxy`: its held-out value,
        trust and cost.
    """
    theta, x = simulations_for(task, simulations, seed)
    with seeded(derive_seed("training", task.name, simulations, seed)):
        trainer = ForkableNPE(task.prior, **context.trainer_kwargs)
        with measured() as cost:
            trainer.append_simulations(theta, x).train(**context.train_kwargs)
    options = context.options()
    options = replace(options, proxy=CONDITIONS[row.condition].build(task.prior, options))
    results = {NPE: _measure(task, trainer, settings, seed, with_c2st, cost.cpu_seconds)}
    with measured() as fit_cost:  # one step, for the proxy: the variants find it fitted
        first = trainer.fork(replace(options, num_steps=1, adaptive=True))
    for name, variant in row.variants.items():
        with measured() as cost:
            fork = trainer.fork(replace(options, **variant.changes), variant.edit)
        results[name] = _measure(task, fork, settings, seed, with_c2st, cost.cpu_seconds)
    held_out = first.summary["proxy_held_out"][-1]
    proxy = {
        "held_out": held_out,
        "note": first.summary["proxy"][-1],
        "trust": float(trust(held_out, trainer.summary["best_validation_loss"][-1])),
        "cpu_seconds": fit_cost.cpu_seconds,
    }
    return {"results": {"variants": results, "proxy": proxy}}


def _measure(
    task: Task,
    trainer: ForkableNPE,
    settings: EvaluationSettings,
    seed: int,
    with_c2st: bool,
    cpu_seconds: float,
) -> dict[str, Any]:
    """Metrics of a trained variant, and what its training took and said."""
    fitted = EstimatorFit(posteriors=[trainer.build_posterior()])
    if with_c2st:
        metrics = evaluate(task, fitted, settings, seed).metrics
    else:
        metrics = pair_metrics(task, fitted, settings, seed)
    training: dict[str, Any] = {"cpu_seconds": cpu_seconds}
    if trainer.summary["multiplier"]:
        training["multiplier"] = trainer.summary["multiplier"][-1]
        training["trust"] = trainer.summary["trust"][-1]
    return {"metrics": metrics, "training": training}


def run_ablation(
    rows: Sequence[Row],
    seeds: int,
    simulations: int,
    settings: EvaluationSettings,
    folder: Path,
    with_c2st: bool = False,
    **how: Any,
) -> Outcome:
    """Measure what is not there yet.

    Args:
        rows: Tasks and conditions of the proxy.
        seeds: Number of seeds, 0 … seeds − 1.
        simulations: Budget.
        settings: What to evaluate.
        folder: Where results go.
        with_c2st: Whether to compare with references at the settings' observations.
        how: `jobs` and `show_progress` of `runner.run_entries`.

    Raises:
        CommandError: See `runner.run_entries`.
    """
    entries = []
    for seed, row in product(range(seeds), rows):
        key = {"row": row.name, "simulations": f"n{simulations}", "seed": f"s{seed}"}
        arguments = {
            "task": get_task(row.task),
            "row": row,
            "simulations": simulations,
            "seed": seed,
            "settings": settings,
            "with_c2st": with_c2st,
        }
        entries.append(study_entry(STUDY, key, measure_row, arguments))
    shared = {**asdict(settings), "c2st": with_c2st}
    return run_entries(entries, shared, folder, CHECK, **how)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ablation`."""
    default = "(default: %(default)s)"
    text = f"comma-separated tasks, or single rows as task:proxy {default}"
    parser.add_argument("--tasks", type=row_list, default=_DEFAULT_TASKS, help=text)
    parser.add_argument("--simulations", type=positive_int(20), default=1000, help=default)
    text = "also C2ST at 3 observations, 4 s per variant and each"
    parser.add_argument("--c2st", action="store_true", help=text)
    add_run_arguments(parser, "benchmark_results/ablation", seeds=3)


def run(args: argparse.Namespace) -> int:
    """Run the ablation and write `ablation.md`; 1 if rows failed."""
    settings = replace(_SETTINGS.smoke(), observations=1) if args.fast else _SETTINGS
    outcome = run_ablation(
        args.tasks, args.seeds, args.simulations, settings, args.out, with_c2st=args.c2st,
        jobs=args.jobs, show_progress=not args.quiet,
    )  # fmt: skip
    return report_outcome(outcome, "measurements", args.out, write_table(args.out))

"""The benchmark: every method on every task, budget and seed, one result file per cell.

A run can be stopped at any time and started again: cells with a valid file are skipped. Methods of
one training (an ensemble and its first member, draws and corrected draws) are trained once, in one
process, and evaluated each.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from sbi_jeffreys.benchmark import _arguments, cells
from sbi_jeffreys.benchmark._arguments import DEFAULT, positive_int
from sbi_jeffreys.benchmark._running import derive_seed, one_thread, quiet
from sbi_jeffreys.benchmark.cells import Cell
from sbi_jeffreys.benchmark.entries import Entry, Outcome, report_outcome, run_entries
from sbi_jeffreys.benchmark.evaluation import (
    EvaluationSettings,
    evaluate,
    references_for,
    simulations_for,
)
from sbi_jeffreys.benchmark.methods import METHODS, FitContext, Method, get_method
from sbi_jeffreys.benchmark.tasks import TASKS, Task, get_task

_DEFAULT_METHODS = "npe_nsf,ensemble5,npe_jeffreys,npe_jeffreys_corrected"


def _measure(
    context: FitContext, task: Task, method: Method, cell: Cell, settings: EvaluationSettings
) -> dict[str, Any]:
    """Train one method and evaluate it."""
    theta, x = simulations_for(task, cell.simulations, cell.seed)
    seed = derive_seed("training", task.name, cell.simulations, cell.seed)
    fitted = method.fit(task, theta, x, seed, context)
    result = evaluate(task, fitted, settings, cell.seed)
    return {
        "status": "done",
        "label": method.label,
        "metrics": result.metrics,
        "per_observation": result.per_observation,
        "training": fitted.info,
        "evaluation_seconds": result.seconds,
    }


def _draw_references(task: Task, settings: EvaluationSettings) -> None:
    """Fill the cache before the cells run, so that no two of them draw the same reference."""
    # What fails here fails again in the cells that need it, and is recorded there.
    with one_thread(), quiet(), suppress(Exception):
        references_for(task, settings)


def run_benchmark(
    tasks: Sequence[str],
    methods: Sequence[str],
    simulations: Sequence[int],
    seeds: Sequence[int],
    settings: EvaluationSettings,
    folder: Path,
    **how: Any,
) -> Outcome:
    """Run all cells that have no valid result yet, cheap budgets first.

    Args:
        tasks: Names of tasks.
        methods: Names of methods.
        simulations: Budgets.
        seeds: Of the simulations and of training.
        settings: What to evaluate.
        folder: Where results go.
        how: `jobs`, `backend`, `show_progress` and `retry_failed` of `run_entries`.

    Raises:
        CommandError: See `run_entries`.
    """
    entries = []
    for task, budget, seed, name in product(tasks, simulations, seeds, methods):
        cell, method = Cell(task, budget, seed, name), get_method(name)
        arguments = {"task": get_task(task), "method": method, "cell": cell, "settings": settings}
        training = (budget, seed, task, method.training)
        entries.append(Entry(cell.file_name, {"cell": asdict(cell)}, _measure, arguments, training))
    entries.sort(key=lambda entry: entry.training)
    return run_entries(
        entries,
        asdict(settings),
        folder,
        cells.cell_problem,
        keep_failures=True,
        prepare=partial(_draw_references, settings=settings),
        **how,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `benchmark`."""
    tasks, text = ",".join(sorted(TASKS)), f"comma-separated {DEFAULT}"
    methods, task_list = _arguments.method_list, _arguments.task_list
    budgets = _arguments.int_list(20)
    parser.add_argument("--tasks", type=task_list, default=tasks, help=text)
    known = f"comma-separated, of {', '.join(METHODS)} {DEFAULT}"
    parser.add_argument("--methods", type=methods, default=_DEFAULT_METHODS, help=known)
    parser.add_argument("--simulations", type=budgets, default="100,1000", help=text)
    parser.add_argument("--observations", type=positive_int(), default=5, help=DEFAULT)
    parser.add_argument(
        "--observation-seed", type=_arguments.seed_number, default=2026, help=DEFAULT
    )
    text = "per observation (default: 5000, with --fast 50)"
    parser.add_argument("--num-samples", type=positive_int(10), default=None, help=text)
    parser.add_argument("--classifier", choices=("mlp", "rf"), default="mlp", help=DEFAULT)
    parser.add_argument(
        "--backend",
        choices=("loky", "dask"),
        default="loky",
        help="processes here, or Dask: local, or the cluster at DASK_SCHEDULER_ADDRESS, whose "
        f"workers must see the same --out {DEFAULT}",
    )
    parser.add_argument("--retry-failed", action="store_true", help="run failed cells again")
    _arguments.add_run_arguments(parser, "results", seeds=5)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; the exit code, which is 1 if cells failed."""
    settings = EvaluationSettings(
        observations=args.observations,
        observation_seed=args.observation_seed,
        classifier=args.classifier,
    )
    settings = settings.smoke() if args.fast else settings
    if args.num_samples is not None:
        settings = replace(settings, num_samples=args.num_samples)
    outcome = run_benchmark(
        args.tasks,
        args.methods,
        args.simulations,
        _arguments.seed_range(args),
        settings,
        args.out,
        jobs=args.jobs,
        backend=args.backend,
        show_progress=not args.quiet,
        retry_failed=args.retry_failed,
    )
    return report_outcome(outcome, "cells", args.out)

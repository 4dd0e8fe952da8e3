"""The benchmark: every method on every task, budget and seed, one result file per cell.

A run can be stopped at any time and started again: cells with a valid file are skipped. Methods of
one training (an ensemble and its first member, draws and corrected draws) are trained once, in one
job, and evaluated each.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import groupby, product
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sbi_jeffreys.benchmark import _parallel, provenance
from sbi_jeffreys.benchmark._arguments import add_common, int_list, method_list, positive_int
from sbi_jeffreys.benchmark._arguments import task_list as _task_list
from sbi_jeffreys.benchmark._running import derive_seed, one_thread, quiet
from sbi_jeffreys.benchmark.cells import (
    Cell,
    CorruptResultError,
    check_settings,
    read_result,
    write_result,
)
from sbi_jeffreys.benchmark.evaluation import (
    EvaluationSettings,
    evaluate,
    references_for,
    simulations_for,
)
from sbi_jeffreys.benchmark.fitted import FittedMethod
from sbi_jeffreys.benchmark.methods import FitContext, Method, get_method
from sbi_jeffreys.benchmark.tasks import TASKS, Task, get_task

__all__ = ["Plan", "add_arguments", "plan", "run", "run_benchmark"]

_DEFAULT_METHODS = "npe_nsf,ensemble5,npe_jeffreys,npe_jeffreys_corrected"


@dataclass(frozen=True)
class Job:
    """Cells of one training: same task, simulations and seed. Carries objects, not names, so that
    tasks and methods that a user registered reach the workers."""

    task: Task
    methods: tuple[Method, ...]
    cells: tuple[Cell, ...]
    settings: EvaluationSettings
    folder: Path
    origin: dict[str, Any]


@dataclass
class Plan:
    """What is to be run, and what is there already."""

    pending: list[Cell] = field(default_factory=list)
    done: list[Cell] = field(default_factory=list)
    failed: list[Cell] = field(default_factory=list)


def plan(
    cells: Iterable[Cell], folder: Path, settings: EvaluationSettings, retry_failed: bool = False
) -> Plan:
    """Sort cells into those to run, those done, and those that failed before.

    A corrupt file is named in a warning and run again.

    Raises:
        ValueError: If a result is there that other settings produced.
    """
    result = Plan()
    for cell in cells:
        path = folder / cell.file_name
        if not path.exists():
            result.pending.append(cell)
            continue
        try:
            record = read_result(path)
        except CorruptResultError as error:
            warnings.warn(f"Corrupt result, computed again: {error}", stacklevel=2)
            result.pending.append(cell)
            continue
        if record["status"] == "failed":
            (result.pending if retry_failed else result.failed).append(cell)
            continue
        check_settings(record["settings"], asdict(settings), path)
        result.done.append(cell)
    return result


def run_job(job: Job) -> list[tuple[Cell, str | None]]:
    """Train and evaluate the cells of a job, writing each; per cell None or why it failed."""
    outcomes: list[tuple[Cell, str | None]] = []
    context = FitContext(fast=job.settings.fast)
    with one_thread(), quiet():
        if not job.settings.fast:
            _parallel.warm_up()
        for method, cell in zip(job.methods, job.cells):
            start, error = time.perf_counter(), None
            content: dict[str, Any]
            try:
                content = _measure(job, method, cell, context)
            except Exception as caught:
                error = f"{type(caught).__name__}: {caught}"
                content = {"status": "failed", "error": error, "traceback": traceback.format_exc()}
            content["seconds"] = time.perf_counter() - start
            content["settings"] = asdict(job.settings)
            content["provenance"] = {
                **provenance.versions(),
                **provenance.machine(),
                **job.origin,
            }
            write_result(job.folder, cell, content)
            outcomes.append((cell, error))
    return outcomes


def _measure(job: Job, method: Method, cell: Cell, context: FitContext) -> dict[str, Any]:
    """Train one method and evaluate it."""
    task = job.task
    theta, x = simulations_for(task, cell.simulations, cell.seed)
    seed = derive_seed("training", task.name, cell.simulations, cell.seed)
    fitted: FittedMethod = method.fit(task, theta, x, seed, context)
    result = evaluate(task, fitted, job.settings, cell.seed)
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


def _jobs(
    cells: Sequence[Cell], settings: EvaluationSettings, folder: Path, origin: dict[str, Any]
) -> list[Job]:
    """Pending cells grouped by training; cheap budgets first."""

    def key(cell: Cell) -> tuple[int, int, str, str]:
        return cell.simulations, cell.seed, cell.task, get_method(cell.method).training

    jobs = []
    for _, group in groupby(sorted(cells, key=key), key=key):
        members = tuple(group)
        methods = tuple(get_method(cell.method) for cell in members)
        task = get_task(members[0].task)
        jobs.append(Job(task, methods, members, settings, folder, origin))
    return jobs


def run_benchmark(
    tasks: Sequence[str],
    methods: Sequence[str],
    simulations: Sequence[int],
    seeds: int,
    settings: EvaluationSettings,
    folder: Path,
    jobs: int = 1,
    backend: str = "loky",
    show_progress: bool = True,
    retry_failed: bool = False,
) -> tuple[Plan, list[tuple[Cell, str]]]:
    """Run all cells that are not there yet.

    Args:
        tasks: Names of tasks.
        methods: Names of methods.
        simulations: Budgets.
        seeds: Number of seeds, 0 … seeds − 1.
        settings: What to evaluate.
        folder: Where results go.
        jobs: Worker processes.
        backend: "loky" (this machine) or "dask" (a cluster).
        show_progress: Whether to show a bar over cells.
        retry_failed: Whether cells that failed before are run again.

    Returns:
        The plan, and the cells that failed in this run with the reason.
    """
    cells = [
        Cell(task, budget, seed, method)
        for task, budget, seed, method in product(tasks, simulations, range(seeds), methods)
    ]
    todo = plan(cells, folder, settings, retry_failed)
    # Absolute, because workers may have another working directory.
    work = _jobs(todo.pending, settings, folder.resolve(), {"command": provenance.command()})
    needed = {job.task.name: job.task for job in work}
    failures: list[tuple[Cell, str]] = []
    with _parallel.Workers(jobs, backend) as workers:
        references = workers.map(_draw_references, [(t, settings) for t in needed.values()])
        for _ in _bar(references, len(needed), "References", show_progress):
            pass
        with tqdm(total=len(todo.pending), desc="Cells", disable=not show_progress) as bar:
            for outcomes in workers.map(run_job, [(job,) for job in work]):
                failures += [(cell, error) for cell, error in outcomes if error is not None]
                bar.update(len(outcomes))
                bar.set_postfix(failed=len(failures))
    return todo, failures


def _bar(items: Iterable[Any], total: int, text: str, show: bool) -> Iterator[Any]:
    return iter(tqdm(items, total=total, desc=text, disable=not show or total == 0))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `benchmark`."""
    default_tasks = ",".join(sorted(TASKS))
    text = "comma-separated (default: %(default)s)"
    parser.add_argument("--tasks", type=_task_list, default=default_tasks, help=text)
    parser.add_argument("--methods", type=method_list, default=_DEFAULT_METHODS, help=text)
    parser.add_argument("--simulations", type=int_list(20), default="100,1000", help=text)
    number = "(default: %(default)s)"
    parser.add_argument("--seeds", type=positive_int(), default=5, help=f"how many {number}")
    parser.add_argument("--observations", type=positive_int(), default=5, help=number)
    parser.add_argument("--observation-seed", type=int, default=2026, help=number)
    parser.add_argument(
        "--num-samples", type=positive_int(10), default=5000, help=f"per observation {number}"
    )
    parser.add_argument("--classifier", choices=("mlp", "rf"), default="mlp", help=number)
    parser.add_argument("--jobs", type=positive_int(), default=1, help=f"processes {number}")
    parser.add_argument(
        "--backend",
        choices=("loky", "dask"),
        default="loky",
        help="processes here, or Dask: local, or the cluster at DASK_SCHEDULER_ADDRESS, whose "
        f"workers must see the same --out {number}",
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help=f"folder {number}")
    parser.add_argument("--retry-failed", action="store_true", help="run failed cells again")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark and report on it; 1 if cells failed, 2 if it cannot start."""
    try:
        settings = EvaluationSettings(
            observations=args.observations,
            observation_seed=args.observation_seed,
            num_samples=args.num_samples,
            classifier=args.classifier,
        )
        todo, failures = run_benchmark(
            args.tasks,
            args.methods,
            args.simulations,
            args.seeds,
            settings.smoke() if args.fast else settings,
            args.out,
            jobs=args.jobs,
            backend=args.backend,
            show_progress=not args.quiet,
            retry_failed=args.retry_failed,
        )
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    computed = len(todo.pending) - len(failures)
    print(f"{computed} cells computed, {len(todo.done)} there already, {len(failures)} failed.")
    for cell, error in failures:
        print(f"  failed: {args.out / cell.file_name}: {error}")
    for cell in todo.failed:
        print(f"  failed before (--retry-failed runs it again): {args.out / cell.file_name}")
    return 1 if failures or todo.failed else 0

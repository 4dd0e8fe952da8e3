"""The benchmark: every method on every task, budget and seed, one result file per cell.

A run can be stopped at any time and started again: cells with a valid file are skipped. Methods of
one training (an ensemble and its first member, draws and corrected draws) are trained once, in one
process, and evaluated each. `run_entries` is the mechanism behind it; the ablation and the rounds
are lists of entries too.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sbi_jeffreys.benchmark import cells, provenance
from sbi_jeffreys.benchmark._arguments import add_common, int_list, method_list, positive_int
from sbi_jeffreys.benchmark._arguments import task_list as _task_list
from sbi_jeffreys.benchmark._parallel import Workers
from sbi_jeffreys.benchmark._running import derive_seed, one_thread, quiet, seeded
from sbi_jeffreys.benchmark.cells import Cell, Check, CorruptResultError
from sbi_jeffreys.benchmark.evaluation import (
    EvaluationSettings,
    evaluate,
    references_for,
    simulations_for,
)
from sbi_jeffreys.benchmark.methods import FitContext, Method, get_method
from sbi_jeffreys.benchmark.tasks import TASKS, Task, get_task

__all__ = ["Entry", "Outcome", "add_arguments", "run", "run_benchmark", "run_entries"]

_DEFAULT_METHODS = "npe_nsf,ensemble5,npe_jeffreys,npe_jeffreys_corrected"
_warm = False


@dataclass(frozen=True)
class Entry:
    """One measurement, which is one file.

    Attributes:
        file_name: Of its record.
        head: What identifies the record.
        measure: Called as `measure(context, **arguments)` in a worker; returns the record's
            content.
        arguments: Picklable; objects rather than names, so that tasks and methods that a user
            registered reach the workers. `task` is one of them.
        training: Neighbours with the same value run in one process and share its trainings.
    """

    file_name: str
    head: dict[str, Any]
    measure: Callable[..., dict[str, Any]]
    arguments: dict[str, Any]
    training: tuple[Any, ...]


def study_entry(
    study: str,
    key: dict[str, str],
    measure: Callable[..., dict[str, Any]],
    arguments: dict[str, Any],
) -> Entry:
    """An entry of a study beside the benchmark: a training of its own, named by its key."""
    name = "-".join(key.values()).replace(":", "_") + ".json"
    return Entry(name, {"study": study, "key": key}, measure, arguments, training=(name,))


@dataclass
class Outcome:
    """What a run did: file names, and for failures the reason."""

    computed: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    failed_before: list[str] = field(default_factory=list)


def run_entries(
    entries: Sequence[Entry],
    settings: dict[str, Any],
    folder: Path,
    check: Check,
    *,
    jobs: int = 1,
    backend: str = "loky",
    show_progress: bool = True,
    keep_failures: bool = False,
    retry_failed: bool = False,
    prepare: Callable[[Task], None] | None = None,
) -> Outcome:
    """Measure the entries that have no valid file yet.

    Args:
        entries: What to measure, those of one training beside each other.
        settings: What all of them share, as JSON holds it; results of others do not mix.
        folder: Where results go.
        check: Says what is wrong with a record; a corrupt file is named and computed again.
        jobs: Worker processes.
        backend: "loky" (this machine) or "dask" (a cluster).
        show_progress: Whether to show a bar.
        keep_failures: Whether a failure is recorded, and run again only with `retry_failed`;
            otherwise it leaves no file, and the next run tries it again.
        retry_failed: Whether recorded failures are run again.
        prepare: Run once per task before its entries.

    Raises:
        CommandError: If a result is there that other settings produced, or the folder cannot be
            written to; nothing has been trained then.
    """
    outcome, pending = Outcome(), []
    for entry in entries:
        kept = _find(folder / entry.file_name, check, settings, retry_failed)
        if kept is None:
            pending.append(entry)
        else:
            (outcome.failed_before if kept == "failed" else outcome.present).append(entry.file_name)
    if pending:
        cells.check_folder(folder)
    groups = [list(group) for _, group in groupby(pending, key=lambda entry: entry.training)]
    # Absolute, because workers may have another working directory.
    common = (settings, folder.resolve(), provenance.command(), keep_failures)
    tasks = {entry.arguments["task"].name: entry.arguments["task"] for entry in pending}
    with Workers(jobs, backend) as workers:
        if prepare is not None:
            ready = workers.map(prepare, [(task,) for task in tasks.values()])
            hidden = not show_progress or not tasks
            for _ in tqdm(ready, total=len(tasks), desc="References", disable=hidden):
                pass
        with tqdm(total=len(pending), desc="Cells", disable=not show_progress) as bar:
            for found in workers.map(_run_group, [(group, *common) for group in groups]):
                outcome.computed += [name for name, error in found if error is None]
                outcome.failed |= {name: error for name, error in found if error is not None}
                bar.update(len(found))
                bar.set_postfix(failed=len(outcome.failed))
    return outcome


def _find(path: Path, check: Check, settings: dict[str, Any], retry_failed: bool) -> str | None:
    """The status of a valid result that is there already, None where it is to be computed."""
    if not path.exists():
        return None
    try:
        record = cells.read_record(path, check)
    except CorruptResultError as error:
        warnings.warn(f"Corrupt result, computed again: {error}", stacklevel=3)
        return None
    if record.get("status") == "failed":
        return None if retry_failed else "failed"
    cells.check_settings(record["settings"], settings, path)
    return "done"


def _run_group(
    entries: Sequence[Entry],
    settings: dict[str, Any],
    folder: Path,
    command: str,
    keep_failures: bool,
) -> list[tuple[str, str | None]]:
    """Measure the entries of one training and write them; per file None, or why it failed."""
    outcomes: list[tuple[str, str | None]] = []
    context = FitContext(fast=settings["fast"])
    with one_thread(), quiet():
        if not context.fast:
            warm_up()
        for entry in entries:
            start, error = time.perf_counter(), None
            content: dict[str, Any]
            try:
                content = entry.measure(context, **entry.arguments)
            except Exception as caught:
                text = traceback.format_exc()
                error = f"{type(caught).__name__}: {caught}" if keep_failures else text
                content = {"status": "failed", "error": error, "traceback": text}
            if error is None or keep_failures:
                origin = {**provenance.versions(), **provenance.machine(), "command": command}
                record = {"format": cells.FORMAT, **entry.head, **content}
                record |= {"seconds": time.perf_counter() - start}
                record |= {"settings": settings, "provenance": origin}
                cells.write_record(folder / entry.file_name, record)
            outcomes.append((entry.file_name, error))
    return outcomes


def warm_up() -> None:
    """Train once on nothing, so that imports and first-call set-up are charged to no method."""
    global _warm
    if _warm:
        return
    task = get_task("gaussian_linear")
    with seeded(0):
        theta, x = task.simulate_joint(50)
        for name in ("npe_nsf", "npe_jeffreys", "nle_mcmc"):
            # A method that does not even run here fails again in its cells, and is recorded there.
            with suppress(Exception):
                get_method(name).fit(task, theta, x, 0, FitContext(fast=True))
    _warm = True


# ------------------------------------------------------------------ the benchmark's entries


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
    seeds: int,
    settings: EvaluationSettings,
    folder: Path,
    **how: Any,
) -> Outcome:
    """Run all cells that are not there yet, cheap budgets first.

    Args:
        tasks: Names of tasks.
        methods: Names of methods.
        simulations: Budgets.
        seeds: Number of seeds, 0 … seeds − 1.
        settings: What to evaluate.
        folder: Where results go.
        how: `jobs`, `backend`, `show_progress` and `retry_failed` of `run_entries`.

    Raises:
        CommandError: See `run_entries`.
    """
    entries = []
    for task, budget, seed, name in product(tasks, simulations, range(seeds), methods):
        cell, method = Cell(task, budget, seed, name), get_method(name)
        arguments = {"task": get_task(task), "method": method, "cell": cell, "settings": settings}
        training = (budget, seed, task, method.training)
        head = {"cell": asdict(cell)}
        entries.append(Entry(cell.file_name, head, _measure, arguments, training))
    entries.sort(key=lambda entry: entry.training)
    prepare = partial(_draw_references, settings=settings)
    return run_entries(
        entries, asdict(settings), folder, cells.cell_problem, keep_failures=True, prepare=prepare,
        **how,
    )  # fmt: skip


# ------------------------------------------------------------------ the command line


def add_run_arguments(parser: argparse.ArgumentParser, out: str, seeds: int) -> None:
    """Options of every command that measures."""
    number = "(default: %(default)s)"
    parser.add_argument("--seeds", type=positive_int(), default=seeds, help=f"how many {number}")
    parser.add_argument("--jobs", type=positive_int(), default=1, help=f"processes {number}")
    parser.add_argument("--out", type=Path, default=Path(out), help=f"folder {number}")
    add_common(parser)


def report_outcome(outcome: Outcome, what: str, folder: Path, table: Path | None = None) -> int:
    """Print what a run did; the exit code, 1 if something failed."""
    counts = (len(outcome.computed), len(outcome.present), len(outcome.failed))
    print("{} {what} computed, {} there already, {} failed.".format(*counts, what=what))
    for name, error in outcome.failed.items():
        print(f"failed: {folder / name}: {error}", file=sys.stderr)
    for name in outcome.failed_before:
        text = f"failed before (--retry-failed runs it again): {folder / name}"
        print(text, file=sys.stderr)
    if table is not None:
        print(f"Table: {table}")
    return 1 if outcome.failed or outcome.failed_before else 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `benchmark`."""
    default_tasks = ",".join(sorted(TASKS))
    text = "comma-separated (default: %(default)s)"
    parser.add_argument("--tasks", type=_task_list, default=default_tasks, help=text)
    parser.add_argument("--methods", type=method_list, default=_DEFAULT_METHODS, help=text)
    parser.add_argument("--simulations", type=int_list(20), default="100,1000", help=text)
    number = "(default: %(default)s)"
    parser.add_argument("--observations", type=positive_int(), default=5, help=number)
    parser.add_argument("--observation-seed", type=int, default=2026, help=number)
    parser.add_argument(
        "--num-samples", type=positive_int(10), default=5000, help=f"per observation {number}"
    )
    parser.add_argument("--classifier", choices=("mlp", "rf"), default="mlp", help=number)
    parser.add_argument(
        "--backend",
        choices=("loky", "dask"),
        default="loky",
        help="processes here, or Dask: local, or the cluster at DASK_SCHEDULER_ADDRESS, whose "
        f"workers must see the same --out {number}",
    )
    parser.add_argument("--retry-failed", action="store_true", help="run failed cells again")
    add_run_arguments(parser, "results", seeds=5)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 if cells failed."""
    settings = EvaluationSettings(
        observations=args.observations,
        observation_seed=args.observation_seed,
        num_samples=args.num_samples,
        classifier=args.classifier,
    )
    outcome = run_benchmark(
        args.tasks, args.methods, args.simulations, args.seeds,
        settings.smoke() if args.fast else settings, args.out,
        jobs=args.jobs, backend=args.backend, show_progress=not args.quiet,
        retry_failed=args.retry_failed,
    )  # fmt: skip
    return report_outcome(outcome, "cells", args.out)

"""Measurements that resume: one JSON file each, skipped where a valid one exists already."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sbi_jeffreys._checks import warn
from sbi_jeffreys.benchmark import cells, provenance
from sbi_jeffreys.benchmark._parallel import workers
from sbi_jeffreys.benchmark._running import one_thread, quiet, seeded
from sbi_jeffreys.benchmark.cells import Check, CorruptResultError
from sbi_jeffreys.benchmark.methods import FitContext, get_method
from sbi_jeffreys.benchmark.tasks import Task, get_task

_warm = False


@dataclass(frozen=True)
class Entry:
    """One measurement, which is one file.

    Attributes:
        file_name: Name of its record.
        head: What identifies the record.
        measure: Called as `measure(context, **arguments)` in a worker; returns the record's
            content.
        arguments: Picklable; objects rather than names, so that tasks and methods that a user
            registered reach the workers. `task` is one of them.
        training: Adjacent entries with the same value run in one process and share trainings.
    """

    file_name: str
    head: dict[str, Any]
    measure: Callable[..., dict[str, Any]]
    arguments: dict[str, Any]
    training: tuple[Any, ...]


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
        settings: Settings of all entries, as JSON holds them; results of others are refused.
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
        CommandError: If other settings produced an existing result, or the folder cannot be
            written to. Nothing is trained in either case.
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
        _check_others(folder, {entry.file_name for entry in entries}, check, settings)
    groups = [list(group) for _, group in groupby(pending, key=lambda entry: entry.training)]
    # The folder is absolute, because workers may have another working directory.
    common = (settings, folder.resolve(), provenance.command(), keep_failures)
    tasks = {entry.arguments["task"].name: entry.arguments["task"] for entry in pending}
    with workers(jobs, backend) as work:
        if prepare is not None:
            ready = work(prepare, [(task,) for task in tasks.values()])
            hidden = not show_progress or not tasks
            for _ in tqdm(ready, total=len(tasks), desc="References", disable=hidden):
                pass
        with tqdm(total=len(pending), desc="Cells", disable=not show_progress) as bar:
            for found in work(_run_group, [(group, *common) for group in groups]):
                outcome.computed += [name for name, error in found if error is None]
                outcome.failed |= {name: error for name, error in found if error is not None}
                bar.update(len(found))
                bar.set_postfix(failed=len(outcome.failed))
    return outcome


def _find(path: Path, check: Check, settings: dict[str, Any], retry_failed: bool) -> str | None:
    """The status of a valid result that exists already, or None if it is to be computed."""
    if not path.exists():
        return None
    try:
        record = cells.read_record(path, check)
    except CorruptResultError as error:
        warn(f"Corrupt result, computed again: {error}")
        return None
    cells.check_settings(record.get("settings", {}), settings, path)
    if record.get("status") == "failed":
        return None if retry_failed else "failed"
    return "done"


def _check_others(folder: Path, own: set[str], check: Check, settings: dict[str, Any]) -> None:
    """Refuse a folder with results of other settings: a report would average over both.

    Args:
        folder: Where results go.
        own: Names of the files of this run, which `_find` has checked.
        check: See `run_entries`.
        settings: See `run_entries`.

    Raises:
        CommandError: Naming one of them, and the settings in which it differs.
    """
    for path, found in cells.read_files(folder, check):
        if path.name not in own and isinstance(found, dict):
            # mutant: settings-mixed-in-a-folder
            cells.check_settings(found.get("settings", {}), settings, path)


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
                brief = str(caught).strip().split("\n")[0]  # torch appends frames of its C++
                error = f"{type(caught).__name__}: {brief}" if keep_failures else text
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
            # A method that fails even here fails again in its cells, and is recorded there.
            with suppress(Exception):
                get_method(name).fit(task, theta, x, 0, FitContext(fast=True))
    _warm = True


def run_study(
    study: str,
    measurements: Iterable[tuple[dict[str, str], dict[str, Any]]],
    measure: Callable[..., dict[str, Any]],
    settings: dict[str, Any],
    check: Check,
    write_table: Callable[[Path], Path | None],
    args: argparse.Namespace,
) -> int:
    """Run a study beside the benchmark, each measurement with a training of its own.

    Args:
        study: Name of the study in its records.
        measurements: Key and arguments of each; the key's values make the file name.
        measure: See `Entry`.
        settings: See `run_entries`.
        check: See `run_entries`.
        write_table: Sums up a folder of results on a page, whose path it returns.
        args: With `jobs`, `quiet` and `out`.

    Returns:
        The exit code: 1 if a measurement failed.
    """
    entries = []
    for key, arguments in measurements:
        name = "-".join(key.values()).replace(":", "_") + ".json"
        entries.append(Entry(name, {"study": study, "key": key}, measure, arguments, (name,)))
    how = {"jobs": args.jobs, "show_progress": not args.quiet}
    outcome = run_entries(entries, settings, args.out, check, **how)
    return report_outcome(outcome, "measurements", args.out, write_table(args.out))


def report_outcome(outcome: Outcome, what: str, folder: Path, table: Path | None = None) -> int:
    """Print what a run did; the exit code, which is 1 if something failed."""
    counts = (len(outcome.computed), len(outcome.present), len(outcome.failed))
    print("{}: {} computed, {} there already, {} failed.".format(what.capitalize(), *counts))
    for name, error in outcome.failed.items():
        print(f"failed: {folder / name}: {error}", file=sys.stderr)
    for name in outcome.failed_before:
        text = f"failed before (--retry-failed runs it again): {folder / name}"
        print(text, file=sys.stderr)
    if table is not None:
        print(f"Table: {table}")
    return 1 if outcome.failed or outcome.failed_before else 0

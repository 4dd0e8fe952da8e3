"""Studies beside the benchmark: one JSON file per measurement, resumable, summed up in one table.

A study is a list of `Entry`s. Those with a valid file are skipped, the others are measured in
workers and written whole or not at all. A failed one leaves no file: the next run tries it again.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sbi_jeffreys.benchmark import _parallel, provenance
from sbi_jeffreys.benchmark._arguments import add_common, positive_int
from sbi_jeffreys.benchmark._running import one_thread, quiet
from sbi_jeffreys.benchmark.cells import (
    CorruptResultError,
    check_settings,
    read_json,
    write_json,
)

__all__ = [
    "Entry",
    "Outcome",
    "add_study_arguments",
    "read_study",
    "report_outcome",
    "run_study",
]

FORMAT = 1  # raise it when the meaning of a field changes


@dataclass(frozen=True)
class Entry:
    """One measurement of a study.

    Attributes:
        key: What it is of; also the name of its file.
        measure: Called as `measure(**arguments)` in a worker; returns what goes into the file.
        arguments: Picklable; objects rather than names, so that what a user registered gets there.
    """

    key: dict[str, Any]
    measure: Callable[..., dict[str, Any]]
    arguments: dict[str, Any]

    @property
    def file_name(self) -> str:
        """Of its result, in the study's folder."""
        return "-".join(str(part).replace(":", "_") for part in self.key.values()) + ".json"


@dataclass
class Outcome:
    """What a run did: file names, and for failures the reason."""

    computed: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def run_study(
    name: str,
    entries: Sequence[Entry],
    settings: dict[str, Any],
    folder: Path,
    jobs: int = 1,
    show_progress: bool = True,
) -> Outcome:
    """Measure the entries that are not there yet.

    Args:
        name: Of the study; files of another one count as corrupt.
        entries: What to measure.
        settings: What all of them share, as JSON holds it; results of others do not mix.
        folder: Where results go.
        jobs: Worker processes.
        show_progress: Whether to show a bar.

    Raises:
        ValueError: If a result is there that other settings produced.
    """
    outcome, pending = Outcome(), []
    for entry in entries:
        path = folder / entry.file_name
        record = _load(name, path) if path.exists() else None
        if record is None:
            pending.append(entry)
            continue
        check_settings(record["settings"], settings, path)
        outcome.present.append(entry.file_name)
    head = {"format": FORMAT, "study": name, "settings": settings, "command": provenance.command()}
    # Absolute, because workers may have another working directory.
    arguments = [(entry, head, folder.resolve()) for entry in pending]
    with (
        _parallel.Workers(jobs) as workers,
        tqdm(total=len(pending), desc=name, disable=not show_progress) as bar,
    ):
        for file_name, error in workers.map(_run, arguments):
            if error is None:
                outcome.computed.append(file_name)
            else:
                outcome.failed[file_name] = error
            bar.update()
    return outcome


def _run(entry: Entry, head: dict[str, Any], folder: Path) -> tuple[str, str | None]:
    """Measure and write one entry; its file name, and why it failed."""
    start = time.perf_counter()
    try:
        with one_thread(), quiet():
            results = entry.measure(**entry.arguments)
    except Exception:
        return entry.file_name, traceback.format_exc()
    record = {
        **head,
        "key": entry.key,
        "results": results,
        "seconds": time.perf_counter() - start,
        "provenance": {**provenance.versions(), **provenance.machine()},
    }
    write_json(folder / entry.file_name, record)
    return entry.file_name, None


def read_study(name: str, folder: Path) -> list[dict[str, Any]]:
    """All valid records of a study in a folder, by file name."""
    records = (_load(name, path) for path in sorted(folder.glob("*.json")))
    return [record for record in records if record is not None]


def _load(name: str, path: Path) -> dict[str, Any] | None:
    """A record, or None and a warning where it is damaged or of something else."""
    try:
        record = read_json(path)
        if not isinstance(record, dict) or record.get("study") != name:
            raise CorruptResultError(f"{path}: not a result of the study {name!r}")
        if record.get("format") != FORMAT:
            raise CorruptResultError(
                f"{path}: expected format {FORMAT}, got {record.get('format')!r}"
            )
        for field_name in ("key", "results", "settings"):
            if not isinstance(record.get(field_name), dict):
                raise CorruptResultError(f"{path}: expected an object {field_name!r}")
    except CorruptResultError as error:
        warnings.warn(f"Corrupt result, not used: {error}", stacklevel=3)
        return None
    return record


def add_study_arguments(parser: argparse.ArgumentParser, out: str, seeds: int) -> None:
    """Options that every study has."""
    number = "(default: %(default)s)"
    parser.add_argument("--seeds", type=positive_int(), default=seeds, help=f"how many {number}")
    parser.add_argument("--jobs", type=positive_int(), default=1, help=f"processes {number}")
    parser.add_argument("--out", type=Path, default=Path(out), help=f"folder {number}")
    add_common(parser)


def report_outcome(outcome: Outcome, table: Path | None) -> int:
    """Print what a run did; 1 if something failed."""
    for file_name, error in outcome.failed.items():
        print(f"failed: {file_name}: {error}", file=sys.stderr)
    counts = (len(outcome.computed), len(outcome.present), len(outcome.failed))
    print("{} measurements computed, {} there already, {} failed.".format(*counts))
    if table is not None:
        print(f"Table: {table}")
    return 1 if outcome.failed else 0

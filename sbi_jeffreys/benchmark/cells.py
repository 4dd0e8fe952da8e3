"""Result files: one JSON record per measurement, written whole or not at all, checked when read."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbi_jeffreys._checks import warn
from sbi_jeffreys.benchmark._running import CommandError

FORMAT = 1  # Raise it when the meaning of a field changes.
_PROBE_BYTES = 2**20  # far more than one record

#: Says what is wrong with a record that was read from a path, or None.
Check = Callable[[Any, Path], "str | None"]


class CorruptResultError(ValueError):
    """A result file that is damaged, or that is not a result file at all."""


@dataclass(frozen=True, order=True)
class Cell:
    """One measurement of the benchmark."""

    task: str
    simulations: int
    seed: int
    method: str

    @property
    def file_name(self) -> str:
        """Name of the cell's result in the results folder."""
        return f"{self.task}-n{self.simulations}-s{self.seed}-{self.method}.json"


# ------------------------------------------------------------------ what a record holds


@dataclass(frozen=True)
class Number:
    """A finite JSON number in [low, high]; null, which stands for NaN, fits if `nullable`."""

    low: float = -sys.float_info.max
    high: float = sys.float_info.max
    nullable: bool = True

    def fits(self, value: Any) -> bool:
        """Whether a value is such a number; true and false are not."""
        if value is None:
            return self.nullable
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and self.low <= value <= self.high


_SHARE = Number(0.0, 1.0)
_NAMES = {dict: "an object", list: "a list", str: "a string", int: "a whole number"}
_DONE = {
    "settings": dict,
    "label?": str,
    "provenance?": dict,
    "metrics": {
        "c2st": Number(0.0, 1.0, nullable=False),
        **dict.fromkeys(("coverage_50?", "coverage_90?", "coverage_95?", "leakage?"), _SHARE),
        "*": Number(),
    },
    "training": dict.fromkeys(
        ("seconds?", "cpu_seconds?", "peak_mib?", "resident_mib?"), Number(0.0)
    ),
    "evaluation_seconds?": {"*": Number(0.0)},
}
_FAILED = {"settings?": dict, "error?": str}
_CELL = {"task": str, "simulations": int, "seed": int, "method": str}


def find_problem(value: Any, expected: Any, name: str = "the record") -> str | None:
    """What is wrong with a value that was read from JSON, with the field's name, or None.

    `expected` is a `Number`; a type; a pattern that a string matches; `[inner]` for a list; or a
    dict of fields, where "name?" may be missing and "*" stands for all other fields.
    """
    if isinstance(expected, Number):
        bounds = f" from {expected.low:g} to {expected.high:g}" if expected == _SHARE else ""
        return None if expected.fits(value) else _mismatch(f"a finite number{bounds}", name, value)
    if isinstance(expected, re.Pattern):
        fits = isinstance(value, str) and expected.fullmatch(value)
        return None if fits else _mismatch(f"text like {expected.pattern}", name, value)
    kind = expected if isinstance(expected, type) else type(expected)
    if not isinstance(value, kind) or isinstance(value, bool):
        return _mismatch(_NAMES[kind], name, value)
    parts: list[tuple[Any, Any, str]] = []
    if isinstance(expected, list):
        parts = [(entry, expected[0], f"{name}[{k}]") for k, entry in enumerate(value)]
    elif isinstance(expected, dict):
        place = "" if name == "the record" else f"{name}."
        required = {key.rstrip("?"): inner for key, inner in expected.items() if key != "*"}
        for key in expected:
            if key != "*" and not key.endswith("?") and key not in value:
                return f"expected a field {place}{key}, which is missing"
        for key, entry in value.items():
            inner = required.get(key, expected.get("*"))
            parts += [] if inner is None else [(entry, inner, f"{place}{key}")]
    return next((found for part in parts if (found := find_problem(*part))), None)


def _mismatch(expected: str, name: str, value: Any) -> str:
    text = repr(value)
    return f"expected {expected} for {name}, got {text if len(text) <= 60 else text[:57] + '…'}"


def cell_problem(record: Any, path: Path) -> str | None:
    """What is wrong with a record of the benchmark, or None."""
    problem = find_problem(record, {"format": int, "status": str, "cell": _CELL})
    if problem:
        return problem
    if record["format"] != FORMAT:
        return f"expected format {FORMAT}, got {record['format']!r}"
    if record["status"] not in ("done", "failed"):
        return f"expected status 'done' or 'failed', got {record['status']!r}"
    if unknown := record["cell"].keys() - _CELL.keys():
        return f"expected a cell with {', '.join(_CELL)}, got also {', '.join(sorted(unknown))}"
    if (name := Cell(**record["cell"]).file_name) != path.name:
        return f"the record belongs to another cell, {name}"
    return find_problem(record, _DONE if record["status"] == "done" else _FAILED)


def study_check(study: str, key: dict[str, Any], results: dict[str, Any]) -> Check:
    """A check of the records of a study, given what `key` and `results` hold (`find_problem`)."""
    expected = {"settings": dict, "key": key, "results": results, "provenance?": dict}

    def check(record: Any, path: Path) -> str | None:
        """What is wrong with a record of the study, or None."""
        if not isinstance(record, dict) or record.get("study") != study:
            return f"not a result of the study {study!r}"
        if record.get("format") != FORMAT:
            return f"expected format {FORMAT}, got {record.get('format')!r}"
        return find_problem(record, expected)

    return check


# ------------------------------------------------------------------ reading and writing


def read_record(path: Path, check: Check = cell_problem) -> dict[str, Any]:
    """A record as it was written; null stands for NaN and infinite values.

    Raises:
        CorruptResultError: Naming the file, and the field or what else is wrong with it.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptResultError(f"{path}: not readable as JSON ({error})") from error
    if problem := check(record, path):
        raise CorruptResultError(f"{path}: {problem}")
    return record


def read_results(
    folder: Path, check: Check = cell_problem
) -> Iterator[dict[str, Any] | CorruptResultError]:
    """Every result of a folder, or what is wrong with it, in the order of file names."""
    return (found for _, found in read_files(folder, check))


def read_files(
    folder: Path, check: Check = cell_problem
) -> Iterator[tuple[Path, dict[str, Any] | CorruptResultError]]:
    """The same with the path of each result."""
    for path in sorted(folder.glob("*.json")):
        try:
            yield path, read_record(path, check)
        except CorruptResultError as error:
            yield path, error


def read_valid(
    folder: Path, check: Check = cell_problem
) -> tuple[list[dict[str, Any]], list[CorruptResultError]]:
    """Valid records and corrupt results of a folder; a warning names each of the corrupt ones."""
    found = list(read_results(folder, check))
    corrupt = [entry for entry in found if isinstance(entry, CorruptResultError)]
    for error in corrupt:
        warn(f"Corrupt result, left out: {error}")
    return [record for record in found if isinstance(record, dict)], corrupt


def write_record(path: Path, record: dict[str, Any]) -> Path:
    """Write a record to a temporary file and rename it, so that `path` never holds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(_plain(record), file, indent=1, allow_nan=False, ensure_ascii=False)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _plain(value: Any) -> Any:
    """The value in JSON's types; NaN and infinity, which JSON lacks, become null."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, (str, int)):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def check_settings(found: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    """Refuse to mix results of different settings.

    Raises:
        CommandError: Naming the settings in which the result at `path` differs.
    """
    differing = [
        f"{name}={found.get(name)!r} (now {value!r})"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    if differing:
        raise CommandError(
            f"out: expected results of the same settings, but {path} has {', '.join(differing)}; "
            "choose another folder, or the settings of this one."
        )


def check_folder(folder: Path) -> None:
    """Create a results folder and write to it, before hours are spent on computing results.

    Raises:
        CommandError: If it is not a folder, not writable, or on a full disk.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
    except OSError as error:
        raise CommandError(
            f"out: expected a folder that can be written to, got {str(folder)!r} "
            f"({error.strerror or error}); choose another folder with --out, or make room."
        ) from error

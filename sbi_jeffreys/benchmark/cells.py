"""Result files: one JSON per cell (task, budget, seed, method), written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Cell",
    "CorruptResultError",
    "check_settings",
    "read_json",
    "read_result",
    "read_results",
    "write_json",
    "write_result",
]

FORMAT = 1  # raise it when the meaning of a field changes


class CorruptResultError(ValueError):
    """A result file that is damaged, or is not one."""


@dataclass(frozen=True, order=True)
class Cell:
    """One measurement."""

    task: str
    simulations: int
    seed: int
    method: str

    @property
    def file_name(self) -> str:
        """Of its result, in the results folder."""
        return f"{self.task}-n{self.simulations}-s{self.seed}-{self.method}.json"


def write_result(folder: Path, cell: Cell, content: dict[str, Any]) -> Path:
    """Write the result of a cell, whole or not at all."""
    return write_json(folder / cell.file_name, {"format": FORMAT, "cell": asdict(cell), **content})


def write_json(path: Path, record: dict[str, Any]) -> Path:
    """Write a record beside its place and rename it, so that nobody ever reads half a file."""
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


def read_result(path: Path) -> dict[str, Any]:
    """A result as it was written; null stands for NaN and infinite values.

    Raises:
        CorruptResultError: Naming the file and what is wrong with it.
    """
    record = read_json(path)
    problem = _problem(record, path)
    if problem:
        raise CorruptResultError(f"{path}: {problem}")
    return record


def read_json(path: Path) -> Any:
    """What a file holds.

    Raises:
        CorruptResultError: If it is not readable as JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptResultError(f"{path}: not readable as JSON ({error})") from error


def check_settings(found: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    """Results of different settings do not mix.

    Raises:
        ValueError: Naming the settings in which the result at `path` differs.
    """
    differing = [
        f"{name}={found.get(name)!r} (now {value!r})"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"out: expected results of the same settings, but {path} has {', '.join(differing)}; "
            "choose another folder, or the settings of this one."
        )


def read_results(folder: Path) -> Iterator[dict[str, Any] | CorruptResultError]:
    """Every result of a folder, or what is wrong with it, in the order of file names."""
    for path in sorted(folder.glob("*.json")):
        try:
            yield read_result(path)
        except CorruptResultError as error:
            yield error


def _problem(record: Any, path: Path) -> str | None:
    """What is wrong with a record, or None."""
    if not isinstance(record, dict):
        return "expected a JSON object"
    if record.get("format") != FORMAT:
        return f"expected format {FORMAT}, got {record.get('format')!r}"
    if record.get("status") not in ("done", "failed"):
        return f"expected status 'done' or 'failed', got {record.get('status')!r}"
    try:
        cell = Cell(**record["cell"])
    except (KeyError, TypeError):
        return f"expected a cell with task, simulations, seed, method, got {record.get('cell')!r}"
    if cell.file_name != path.name:
        return f"it belongs to another cell, {cell.file_name}"
    if record["status"] == "done":
        for name in ("metrics", "training", "settings"):
            if not isinstance(record.get(name), dict):
                return f"expected an object {name!r}"
        if not isinstance(record["metrics"].get("c2st"), (int, float)):
            return f"expected a number for c2st, got {record['metrics'].get('c2st')!r}"
    return None


def _plain(value: Any) -> Any:
    """JSON's types only; NaN and infinity, which JSON does not know, become null."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    number = float(value)
    return number if math.isfinite(number) else None

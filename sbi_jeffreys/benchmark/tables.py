"""Tables of all commands, as Markdown or as plain text, and the pages that they stand on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tabulate import tabulate

from sbi_jeffreys.benchmark import cells
from sbi_jeffreys.benchmark.cells import Check, CorruptResultError
from sbi_jeffreys.benchmark.provenance import summary_lines
from sbi_jeffreys.benchmark.statistics import Methods, summarise

__all__ = ["markdown", "plain", "read_valid", "shown", "study_check", "values_table", "write_page"]

Rows = Sequence[Sequence[Any]]


def _table(rows: Rows, style: str) -> str:
    """A table, header first; the first column to the left, the others to the right."""
    head, *body = rows
    sides = ["left"] + ["right"] * (len(head) - 1)
    return tabulate(body, head, style, colalign=sides, disable_numparse=True)


markdown: Callable[[Rows], str] = partial(_table, style="pipe")
plain: Callable[[Rows], str] = partial(_table, style="simple")


def shown(value: Any, spec: str = "") -> str:
    """A value as text, or – where there is none."""
    return "–" if value is None else format(value, spec)


def values_table(
    methods: Methods, labels: Mapping[str, str], columns: Mapping[str, tuple[str, int]], what: str
) -> str:
    """Mean ± standard error over seeds, one row per method; columns without any value are left out.

    Args:
        methods: Method → seed → metric → value.
        labels: How tables call the methods, in their order; others follow by their names.
        columns: Metric → title and digits.
        what: Title of the first column.
    """
    names = [name for name in labels if name in methods]
    names += sorted(methods.keys() - labels.keys())
    found = {m: [summarise(methods[name], m) for name in names] for m in columns}
    kept = [metric for metric in columns if any(found[metric])]
    rows = [[what, "seeds", *(columns[metric][0] for metric in kept)]]
    for k, name in enumerate(names):
        values = [shown(found[metric][k], f".{columns[metric][1]}f") for metric in kept]
        rows.append([labels.get(name, name), str(len(methods[name])), *values])
    return markdown(rows)


def write_page(path: Path, parts: Iterable[str]) -> Path:
    """Write the parts that are not empty as one Markdown page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


# ------------------------------------------------------------------ studies beside the benchmark


def study_check(study: str, key: dict[str, Any], results: dict[str, Any]) -> Check:
    """What the records of a study must hold: `key` and `results` as `cells.find_problem` has it."""
    expected = {"settings": dict, "key": key, "results": results, "provenance?": dict}

    def check(record: Any, path: Path) -> str | None:
        """What is wrong with a record of the study, or None."""
        if not isinstance(record, dict) or record.get("study") != study:
            return f"not a result of the study {study!r}"
        if record.get("format") != cells.FORMAT:
            return f"expected format {cells.FORMAT}, got {record.get('format')!r}"
        return cells.find_problem(record, expected)

    return check


def read_valid(folder: Path, check: Check) -> list[dict[str, Any]]:
    """All valid records of a folder, by file name; a warning names each of the others."""
    records = []
    for record in cells.read_results(folder, check):
        if isinstance(record, CorruptResultError):
            warnings.warn(f"Corrupt result, not used: {record}", stacklevel=3)
        else:
            records.append(record)
    return records


def origin_text(records: Iterable[Mapping[str, Any]]) -> str:
    """The last section of a study's page."""
    return "## Where this comes from\n\n" + summary_lines(records)

"""Tables of all commands, as Markdown or as plain text, and the pages that they stand on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tabulate import tabulate

from sbi_jeffreys.benchmark.cells import Check, read_valid
from sbi_jeffreys.benchmark.provenance import summary_lines
from sbi_jeffreys.benchmark.statistics import Methods, summarise

Rows = Sequence[Sequence[Any]]
FELL_BACK = "† no proxy was used: plain NPE"  # footnote


def _table(rows: Rows, style: str) -> str:
    """A table, header first; the first column is aligned to the left, the others to the right."""
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
    """Mean ± standard error over seeds, one row per method; empty columns are omitted.

    Args:
        methods: Method → seed → metric → value.
        labels: What tables call the methods, in their order; other methods follow by their names.
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


def write_study_page(
    path: Path, check: Check, parts: Callable[[list[dict[str, Any]]], Sequence[str]]
) -> Path | None:
    """Sum up the valid results beside a page on it; its path, or None without any result."""
    records, _ = read_valid(path.parent, check)
    if not records:
        return None
    origin = "## Where this comes from\n\n" + summary_lines(records)
    return write_page(path, [*parts(records), origin])

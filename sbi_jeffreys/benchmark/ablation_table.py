"""The ablation's table in Markdown, with a verdict per row on what adaptive weights promise."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sbi_jeffreys.benchmark.cells import Number
from sbi_jeffreys.benchmark.statistics import (
    Methods,
    nest,
    paired_difference,
    paired_summary,
    summarise,
)
from sbi_jeffreys.benchmark.tables import (
    markdown,
    origin_text,
    read_valid,
    shown,
    study_check,
    values_table,
    write_page,
)
from sbi_jeffreys.benchmark.variants import CONDITIONS, VARIANTS

__all__ = ["CHECK", "NPE", "STUDY", "tabulate", "verdict", "write_table"]

STUDY = "ablation"
NPE, ADAPTIVE = "npe", "adaptive"
_FROZEN = tuple(name for name in VARIANTS if name.startswith("frozen"))
_LABELS = {NPE: "NPE (stage 0)", **{name: variant.label for name, variant in VARIANTS.items()}}
_COLUMNS = {
    "nll": ("NLL", 3),
    "kl_reverse": ("reverse KL + const.", 3),
    "jeffreys": ("Jeffreys", 2),
    "coverage_90": ("cov. 90 %", 3),
    "c2st": ("C2ST", 3),
    "multiplier": ("last λ", 2),
    "cpu_seconds": ("cpu s", 1),
}
#: On which the promises are checked; less is better.
_PROMISED = {
    "nll": "NLL",
    "jeffreys": "Jeffreys",
    "coverage_error_90": "coverage error",
    "c2st": "C2ST",
}
#: What a record must hold; those of earlier versions have variants that no longer exist.
CHECK = study_check(
    STUDY,
    {
        "row": re.compile(rf"\w+:({'|'.join(CONDITIONS)})"),
        "simulations": re.compile(r"n\d+"),
        "seed": re.compile(r"s\d+"),
    },
    {
        "variants": {"*": {"metrics": {"*": Number()}, "training": {"*": Number()}}},
        "proxy": {"held_out": Number(), "trust": Number(nullable=False)},
    },
)

RowKey = tuple[str, str]  # task and condition of the proxy; budget


def tabulate(records: Iterable[Mapping[str, Any]]) -> dict[RowKey, Methods]:
    """Values of all records by row and budget, variant and seed, with the coverage error."""
    return nest(
        (_row(record), name, _seed(record), {**entry["metrics"], **entry["training"]})
        for record in records
        for name, entry in record["results"]["variants"].items()
    )


def _row(record: Mapping[str, Any]) -> RowKey:
    return record["key"]["row"], record["key"]["simulations"]


def _seed(record: Mapping[str, Any]) -> int:
    return int(record["key"]["seed"].removeprefix("s"))


def best_frozen(row: Methods, metric: str) -> str | None:
    """The frozen weighting with the lowest mean, chosen after the fact, per metric."""
    means = {name: summarise(row.get(name, {}), metric) for name in _FROZEN}
    known = {name: summary.mean for name, summary in means.items() if summary is not None}
    return min(known, key=lambda name: known[name]) if known else None


def verdict(row: Methods, other: str | None, metric: str) -> str:
    """Whether adaptive is not worse than `other`, of a metric of which less is better.

    Returns:
        "holds": not worse in the mean; "within noise": worse by at most twice the standard error
        of the paired difference; "BROKEN": by more; "worse, one seed": no standard error; "–":
        not measured.
    """
    gap = paired_summary(row.get(ADAPTIVE, {}), row.get(other or "", {}), metric)
    if gap is None:
        return "–"
    if gap.mean <= 0:
        return "holds"
    if math.isnan(gap.standard_error):
        return "worse, one seed"
    return "within noise" if gap.mean <= 2 * gap.standard_error else "BROKEN"


def _row_text(key: RowKey, row: Methods, notes: list[str]) -> str:
    """Both tables of one row, and its verdicts."""
    gaps = [["adaptive minus", "best frozen", "verdict", "NPE", "verdict"]]
    for metric, title in _PROMISED.items():
        best = best_frozen(row, metric)
        cells = [title]
        for other in (best, NPE):
            found = row.get(other or "", {})
            text = shown(paired_difference(row.get(ADAPTIVE, {}), found, metric))
            if other == best and best is not None:
                text += f" ({_LABELS[best].removeprefix('frozen, ')})"
            cells += [text, verdict(row, other, metric)]
        if set(cells[1:]) != {"–"}:
            gaps.append(cells)
    task, _, condition = key[0].partition(":")
    head = f"## {task}, proxy {CONDITIONS[condition].label}, {key[1][1:]} simulations"
    values = values_table(row, _LABELS, _COLUMNS, "variant")
    return "\n\n".join([head, "\n".join(notes), values, markdown(gaps)])


def _summary(table: Mapping[RowKey, Methods]) -> str:
    """One line per row and promise."""
    rows = [["row", *(f"{title}: frozen / NPE" for title in _PROMISED.values())]]
    for (name, budget), row in sorted(table.items()):
        verdicts = [
            f"{verdict(row, best_frozen(row, metric), metric)} / {verdict(row, NPE, metric)}"
            for metric in _PROMISED
        ]
        rows.append([f"{name}, {budget[1:]}", *verdicts])
    return markdown(rows)


def _note(record: Mapping[str, Any]) -> str:
    """What was found out about the proxy of one seed."""
    proxy = record["results"]["proxy"]
    value = "not finite" if proxy["held_out"] is None else f"{proxy['held_out']:.3f}"
    seed = record["key"]["seed"]
    return f"- {seed}: held-out NLL of the proxy {value}, trust {proxy['trust']:.3f}"


def write_table(folder: Path) -> Path | None:
    """Sum up all results of a folder in `ablation.md`; its path, or None without any result."""
    records = read_valid(folder, CHECK)
    if not records:
        return None
    table = tabulate(records)
    notes = {key: [_note(record) for record in records if _row(record) == key] for key in table}
    parts = [
        "# Ablation of the symmetric stage",
        "Mean ± standard error over seeds; differences are paired by seed, with 95 % t-intervals; "
        "less is better in each. Frozen weights run at trust and temperature 1 and keep, like all "
        "variants, the library's choice of weights by held-out value. The best frozen weighting is "
        "chosen per metric after the fact.",
        "## Promises: adaptive is not worse than the best frozen weighting / than plain NPE\n\n"
        + _summary(table)
        + "\n\nholds: not worse in the mean; within noise: by at most twice the standard error; "
        "BROKEN: by more.",
        *(_row_text(key, row, notes[key]) for key, row in sorted(table.items())),
        origin_text(records),
    ]
    return write_page(folder / "ablation.md", parts)

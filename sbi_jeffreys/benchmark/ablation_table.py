"""The ablation's table in Markdown, with a verdict per row on what adaptive weights promise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sbi_jeffreys.benchmark.provenance import summary_lines
from sbi_jeffreys.benchmark.report import interval_text, markdown_table, summary_text
from sbi_jeffreys.benchmark.statistics import Summary, paired_difference, paired_values, summarise
from sbi_jeffreys.benchmark.studies import read_study
from sbi_jeffreys.benchmark.variants import CONDITIONS, VARIANTS

__all__ = ["NPE", "STUDY", "tabulate", "verdict", "write_table"]

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

#: variant → seed → metric → value
RowTable = dict[str, dict[int, dict[str, float]]]


def tabulate(records: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], RowTable]:
    """Values of all records by (row, budget), variant and seed, with the coverage error."""
    table: dict[tuple[str, str], RowTable] = {}
    for record in records:
        key = record["key"]
        row = table.setdefault((key["row"], key["simulations"]), {})
        for name, entry in record["results"]["variants"].items():
            values = {**entry["metrics"], **entry["training"]}
            if values.get("coverage_90") is not None:
                values["coverage_error_90"] = abs(values["coverage_90"] - 0.9)
            finite = {metric: float(v) for metric, v in values.items() if v is not None}
            row.setdefault(name, {})[int(key["seed"].removeprefix("s"))] = finite
    return table


def _gap(row: RowTable, other: str, metric: str) -> Summary | None:
    """Adaptive minus another variant, paired by seed."""
    both = paired_values(row.get(ADAPTIVE, {}), row.get(other, {}), metric)
    return summarise({k: {metric: a - b} for k, (a, b) in enumerate(both)}, metric)


def best_frozen(row: RowTable, metric: str) -> str | None:
    """The frozen weighting with the lowest mean, chosen after the fact: the hardest rival."""
    means = {name: summarise(row.get(name, {}), metric) for name in _FROZEN}
    known = {name: summary.mean for name, summary in means.items() if summary is not None}
    return min(known, key=lambda name: known[name]) if known else None


def verdict(row: RowTable, other: str | None, metric: str) -> str:
    """Whether adaptive is not worse than `other`, of a metric of which less is better.

    Returns:
        "holds": not worse in the mean; "within noise": worse by at most twice the standard error
        of the paired difference; "BROKEN": by more; "worse, one seed": no standard error; "–":
        not measured.
    """
    gap = None if other is None else _gap(row, other, metric)
    if gap is None:
        return "–"
    if gap.mean <= 0:
        return "holds"
    if math.isnan(gap.standard_error):
        return "worse, one seed"
    return "within noise" if gap.mean <= 2 * gap.standard_error else "BROKEN"


def _row_text(name: str, budget: str, row: RowTable, notes: list[str]) -> str:
    """Both tables of one row, and its verdicts."""
    names = [variant for variant in _LABELS if variant in row]
    shown = [m for m in _COLUMNS if any(summarise(row[variant], m) for variant in names)]
    values = [["variant", "seeds", *(_COLUMNS[m][0] for m in shown)]]
    for variant in names:
        cells = [summary_text(summarise(row[variant], m), _COLUMNS[m][1]) for m in shown]
        values.append([_LABELS[variant], str(len(row[variant])), *cells])
    gaps = [["adaptive minus", "best frozen", "verdict", "NPE", "verdict"]]
    for metric, title in _PROMISED.items():
        best = best_frozen(row, metric)
        cells = [title]
        for other in (best, NPE):
            found = row.get(other or "", {})
            text = interval_text(paired_difference(row.get(ADAPTIVE, {}), found, metric))
            if other == best and best is not None:
                text += f" ({_LABELS[best].removeprefix('frozen, ')})"
            cells += [text, verdict(row, other, metric)]
        if set(cells[1:]) != {"–"}:
            gaps.append(cells)
    task, _, condition = name.partition(":")
    head = f"## {task}, proxy {CONDITIONS[condition].label}, {budget[1:]} simulations"
    return "\n\n".join([head, "\n".join(notes), markdown_table(values), markdown_table(gaps)])


def _summary(table: Mapping[tuple[str, str], RowTable]) -> str:
    """One line per row and promise."""
    rows = [["row", *(f"{t}: frozen / NPE" for t in _PROMISED.values())]]
    for (name, budget), row in sorted(table.items()):
        cells = [
            f"{verdict(row, best_frozen(row, metric), metric)} / {verdict(row, NPE, metric)}"
            for metric in _PROMISED
        ]
        rows.append([f"{name}, {budget[1:]}", *cells])
    return markdown_table(rows)


def _notes(records: list[dict[str, Any]]) -> dict[tuple[str, str], list[str]]:
    """What was found out about the proxy of each row, seed by seed."""
    notes: dict[tuple[str, str], list[str]] = {}
    for record in records:
        key, proxy = record["key"], record["results"]["proxy"]
        held_out, trust = proxy["held_out"], proxy["trust"]
        value = "not finite" if held_out is None else f"{held_out:.3f}"
        text = f"- {key['seed']}: held-out NLL of the proxy {value}, trust {trust:.3f}"
        notes.setdefault((key["row"], key["simulations"]), []).append(text)
    return notes


def write_table(folder: Path) -> Path | None:
    """Sum up all results of a folder in `ablation.md`; its path, or None without any result."""
    records = read_study(STUDY, folder)
    if not records:
        return None
    table, notes = tabulate(records), _notes(records)
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
        *(_row_text(*key, row, notes[key]) for key, row in sorted(table.items())),
        "## Where this comes from\n\n" + summary_lines(records),
    ]
    path = folder / "ablation.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path

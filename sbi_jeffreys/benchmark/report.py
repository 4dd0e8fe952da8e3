"""The benchmark's report: tables in Markdown, and figures, from the result files.

Every method is compared with NPE on the same simulations, seed by seed. Where NPE_Jeffreys loses is
said in a section of its own.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbi_jeffreys.benchmark.cells import Cell, CorruptResultError, read_results
from sbi_jeffreys.benchmark.figures import write_figures
from sbi_jeffreys.benchmark.methods import METHODS
from sbi_jeffreys.benchmark.provenance import summary_lines
from sbi_jeffreys.benchmark.statistics import (
    SCORES,
    Difference,
    Summary,
    Table,
    collect,
    differences,
    ratio,
    summarise,
)

__all__ = ["add_arguments", "run", "write_report"]

BASELINE = "npe_nsf"
_OURS = "npe_jeffreys"
_STRONG = ("npe_nsf", "ensemble5")  # whom a loss against is reported
_COLUMNS = {
    "c2st": ("C2ST", 3),
    "nll": ("NLL", 2),
    "coverage_50": ("cov. 50 %", 2),
    "coverage_90": ("cov. 90 %", 2),
    "coverage_95": ("cov. 95 %", 2),
    "leakage": ("leakage", 3),
    "mode_l1": ("mode L1", 2),
    "jeffreys": ("Jeffreys", 2),
    "ess": ("ESS", 2),
    "train_seconds": ("train s", 1),
}


def write_report(results: Path, out: Path, show_progress: bool = True) -> Path:
    """Read all results, write `report.md` and the figures; the path of the report.

    Raises:
        ValueError: If there is no readable finished result.
    """
    done, failed, corrupt = _load(results)
    if not done:
        raise ValueError(
            f"results: expected finished cells in {results}, found none "
            f"({len(failed)} failed, {len(corrupt)} corrupt); run `benchmark` first."
        )
    table = collect(_with_comparable_costs(done))
    labels = _labels(done)
    out.mkdir(parents=True, exist_ok=True)
    figures = write_figures(table, labels, out, show_progress)
    parts = [
        "# Benchmark of NPE_Jeffreys",
        f"{len(done)} cells.\n\n" + summary_lines(done),
        "## Over all tasks\n\n" + _overall(table, labels),
        f"## Wins, ties, losses against {labels.get(BASELINE, BASELINE)}\n\n"
        + _verdicts(table, labels),
        f"## Where {labels.get(_OURS, _OURS)} loses\n\n" + _losses(table, labels),
        "## Cost\n\n" + _costs(table, labels),
        "## Figures\n\n" + "\n\n".join(f"![{path.stem}]({path.name})" for path in figures),
        "## Every task\n\n" + "\n\n".join(_group(table, group, labels) for group in sorted(table)),
        _problems(failed, corrupt),
    ]
    path = out / "report.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def _load(
    folder: Path,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[CorruptResultError]]:
    """Finished, failed and corrupt results; the corrupt ones are warned about by name."""
    done: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    corrupt: list[CorruptResultError] = []
    for entry in read_results(folder):
        if isinstance(entry, CorruptResultError):
            warnings.warn(f"Corrupt result, left out: {entry}", stacklevel=3)
            corrupt.append(entry)
        else:
            (done if entry["status"] == "done" else failed).append(entry)
    return done, failed, corrupt


def _with_comparable_costs(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records, without times where NPE of the same simulations was timed by another commit.

    Accuracy of a method whose code did not change may come from an earlier run on the same
    simulations; its time may not: machines differ from day to day by more than methods do.
    """

    def commit(record: Mapping[str, Any]) -> Any:
        return record.get("provenance", {}).get("git_commit")

    def place(record: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(record["cell"][key] for key in ("task", "simulations", "seed"))

    timed = {place(r): commit(r) for r in records if r["cell"]["method"] == BASELINE}
    kept = []
    for record in records:
        same = timed.get(place(record), commit(record)) == commit(record)
        training = record["training"] if same else {}
        kept.append({**record, "training": training})
    return kept


def _labels(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Methods in the registry's order, others after them, with what tables call them."""
    known = {name: method.label for name, method in METHODS.items()}
    found = {r["cell"]["method"]: r.get("label", r["cell"]["method"]) for r in records}
    order = [name for name in known if name in found] + sorted(found.keys() - known.keys())
    return {name: found[name] for name in order}


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, header first, numbers to the right."""
    head, *body = rows
    rule = [":--"] + ["--:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def summary_text(summary: Summary | None, digits: int) -> str:
    """Mean ± standard error, or – where there is nothing."""
    if summary is None:
        return "–"
    if math.isnan(summary.standard_error):
        return f"{summary.mean:.{digits}f}"
    return f"{summary.mean:.{digits}f} ± {summary.standard_error:.{digits}f}"


def interval_text(difference: Difference | None, digits: int = 3) -> str:
    """Mean difference and its 95 % interval."""
    if difference is None:
        return "–"
    if difference.count == 1:
        return f"{difference.mean:+.{digits}f} (one seed)"
    bounds = f"[{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"
    return f"{difference.mean:+.{digits}f} {bounds}"


def _group(table: Table, group: tuple[str, int], labels: Mapping[str, str]) -> str:
    """Both tables of one task and budget: values, and differences to NPE."""
    methods = table[group]
    names = [name for name in labels if name in methods]
    shown = [m for m in _COLUMNS if any(summarise(methods[name], m) for name in names)]
    rows = [["method", "seeds", *(_COLUMNS[m][0] for m in shown)]]
    for name in names:
        cells = [summary_text(summarise(methods[name], m), _COLUMNS[m][1]) for m in shown]
        rows.append([labels[name], str(len(methods[name])), *cells])
    text = f"### {group[0]}, {group[1]:,} simulations\n\n"
    text += "Mean ± standard error over seeds.\n\n" + markdown_table(rows)
    others = [name for name in names if name != BASELINE]
    if BASELINE not in methods or not others:
        return text
    scores = [m for m in SCORES if summarise(methods[BASELINE], m)]
    rows = [[f"minus {labels[BASELINE]}", *(SCORES[m] for m in scores)]]
    for name in others:
        found = differences({group: methods}, name, BASELINE)
        rows.append([labels[name], *(interval_text(found.get((group, m))) for m in scores)])
    return text + "\n\nPaired by seed, 95 % t-interval; less is better.\n\n" + markdown_table(rows)


def _overall(table: Table, labels: Mapping[str, str]) -> str:
    """Means over the tasks that every method has, by budget, C2ST beside coverage."""
    blocks = []
    for budget in sorted({budget for _, budget in table}):
        groups = [g for g in sorted(table) if g[1] == budget]
        names = [n for n in labels if any(n in table[g] for g in groups)]
        common = [g for g in groups if all(n in table[g] for n in names)]
        if not common:
            blocks.append(f"{budget:,} simulations: no task that every method has.")
            continue
        shown = ("c2st", "coverage_error_90", "leakage", "nll")
        rows = [["method", *(SCORES[m] for m in shown)]]
        for name in names:
            row = [labels[name]]
            for metric in shown:
                means = [summarise(table[g][name], metric) for g in common]
                values = [s.mean for s in means if s is not None]
                complete = len(values) == len(common)
                row.append(f"{sum(values) / len(values):.3f}" if complete else "–")
            rows.append(row)
        tasks = ", ".join(g[0] for g in common)
        blocks.append(f"{budget:,} simulations, mean of {tasks}:\n\n{markdown_table(rows)}")
    return "\n\n".join(blocks)


def _verdicts(table: Table, labels: Mapping[str, str]) -> str:
    """Counts over tasks and budgets; a win or loss is an interval that excludes zero."""
    rows = [["method", *SCORES.values()]]
    for name in (n for n in labels if n != BASELINE):
        row = [labels[name]]
        found = differences(table, name, BASELINE)
        for metric in SCORES:
            counts = Counter(d.verdict for (_, m), d in found.items() if m == metric)
            shown = " / ".join(str(counts[verdict]) for verdict in ("win", "tie", "loss"))
            row.append(shown if counts else "–")
        rows.append(row)
    note = "Wins / ties / losses over tasks and budgets: the paired 95 % interval decides.\n\n"
    return note + markdown_table(rows)


def _losses(table: Table, labels: Mapping[str, str]) -> str:
    """Every cell group and metric in which NPE_Jeffreys is worse, surely or in the mean."""
    lines = []
    for opponent in (name for name in _STRONG if name in labels):
        found = differences(table, _OURS, opponent)
        lost = {key: d for key, d in found.items() if d.verdict == "loss"}
        worse = {key: d for key, d in found.items() if d.verdict == "tie" and d.mean > 0}
        lines.append(
            f"Against {labels[opponent]}: {len(lost)} losses in {len(found)} comparisons; worse in "
            f"the mean, within noise, in {len(worse)}."
        )
        for word, entries in (("loses", lost), ("worse, within noise", worse)):
            for ((task, budget), metric), d in sorted(entries.items()):
                lines.append(f"- {word}: {task}, {budget:,}, {SCORES[metric]}: {interval_text(d)}")
        lines.append("")
    return "\n".join(lines).strip() or "No comparison: NPE_Jeffreys or its opponents are missing."


def _costs(table: Table, labels: Mapping[str, str]) -> str:
    """Training time and memory relative to NPE, by budget."""
    rows = [["method", "simulations", "time", "processor time", "peak memory", "its growth"]]
    for name in (n for n in labels if n != BASELINE):
        for budget in sorted({budget for _, budget in table}):
            row = [labels[name], f"{budget:,}"]
            for metric in ("train_seconds", "train_cpu_seconds", "resident_mib", "peak_mib"):
                ratios = [
                    r
                    for group, methods in table.items()
                    if group[1] == budget and name in methods and BASELINE in methods
                    if (r := ratio(methods[name], methods[BASELINE], metric)) is not None
                ]
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan
                row.append(f"{mean:.2f} ×" if ratios else "–")
            rows.append(row)
    note = (
        "Training, relative to NPE: geometric mean over tasks and seeds. Memory is the "
        "resident set at its peak; its growth is over what the process held at the start.\n\n"
    )
    return note + markdown_table(rows)


def _problems(failed: Sequence[Mapping[str, Any]], corrupt: Sequence[CorruptResultError]) -> str:
    """Failures and corrupt files, if any."""
    lines = [f"- failed: {Cell(**r['cell']).file_name}: {r.get('error')}" for r in failed]
    lines += [f"- corrupt, left out: {error}" for error in corrupt]
    return "## Left out\n\n" + "\n".join(lines) if lines else ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `report`."""
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the cells")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of the report")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Write the report; 2 if there is nothing to report."""
    try:
        path = write_report(args.results, args.out, show_progress=not args.quiet)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Report: {path}")
    return 0

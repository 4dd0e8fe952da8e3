"""The benchmark's report: tables in Markdown, and figures, from the result files.

Every method is compared with NPE on the same simulations, seed by seed. One section lists where
NPE_Jeffreys loses.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

from sbi_jeffreys.benchmark._arguments import DEFAULT
from sbi_jeffreys.benchmark._running import CommandError
from sbi_jeffreys.benchmark.cells import Cell, CorruptResultError, check_folder, read_valid
from sbi_jeffreys.benchmark.figures import write_figures
from sbi_jeffreys.benchmark.methods import METHODS
from sbi_jeffreys.benchmark.overview import task_by_task
from sbi_jeffreys.benchmark.provenance import summary_lines
from sbi_jeffreys.benchmark.statistics import (
    SCORES,
    Difference,
    Group,
    Methods,
    collect,
    paired_difference,
    ratio,
    summarise,
)
from sbi_jeffreys.benchmark.tables import FELL_BACK, markdown, shown, values_table, write_page

BASELINE = "npe_nsf"
_OURS = "npe_jeffreys"
_STRONG = ("npe_nsf", "ensemble5")  # the methods against which losses are reported
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
_COSTS = {
    "train_seconds": "time",
    "train_cpu_seconds": "processor time",
    "resident_mib": "peak memory",
    "peak_mib": "its growth",
}

Table = dict[Group, Methods]


def write_report(results: Path, out: Path, show_progress: bool = True) -> Path:
    """Read all results, write `report.md` and the figures; the path of the report.

    Raises:
        CommandError: If there is no readable finished result, or `out` cannot be written to.
    """
    _check_readable(results)
    records, corrupt = read_valid(results)
    done = [record for record in records if record["status"] == "done"]
    failed = [record for record in records if record["status"] != "done"]
    if not done:
        raise CommandError(
            f"results: expected finished cells in {results}, found none "
            f"({len(failed)} failed, {len(corrupt)} corrupt); run `benchmark` first."
        )
    table, labels = collect(_with_comparable_costs(done)), _labels(done)
    check_folder(out)
    figures = write_figures(table, labels, out, show_progress)
    sections = {
        "Over all tasks": _overall(table, labels),
        "Task by task": "\n\n".join(task_by_task(table, labels, BASELINE)),
        f"Wins, ties, losses against {labels.get(BASELINE, BASELINE)}": _verdicts(table, labels),
        f"Where {labels.get(_OURS, _OURS)} loses": _losses(table, labels),
        "Cost": _costs(table, labels),
        "Figures": "\n\n".join(f"![{path.stem}]({path.name})" for path in figures),
        "Every task, all values": "\n\n".join(
            _group(table, group, labels) for group in sorted(table)
        ),
        "Left out": _problems(failed, corrupt),
    }
    head = ["# Benchmark of NPE_Jeffreys", f"{len(done)} cells.\n\n" + summary_lines(done)]
    parts = [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    return write_page(out / "report.md", [*head, *parts])


def _check_readable(folder: Path) -> None:
    """Require a folder that can be listed: one without results would look the same."""
    try:
        next(folder.iterdir(), None)  # mutant: unreadable-folder-is-empty
    except OSError as error:
        raise CommandError(
            f"results: expected a folder that can be read, got {str(folder)!r} "
            f"({error.strerror or error}); pass another one with --results."
        ) from error


def _with_comparable_costs(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records, without times where NPE of the same simulations was timed by another commit.

    The accuracy of a method whose code did not change may come from an earlier run on the same
    simulations. Its time may not, because a machine's speed changes from day to day by more than
    methods differ.
    """

    def commit(record: Mapping[str, Any]) -> Any:
        return record.get("provenance", {}).get("git_commit")

    def place(record: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(record["cell"][key] for key in ("task", "simulations", "seed"))

    timed = {place(r): commit(r) for r in records if r["cell"]["method"] == BASELINE}
    return [
        record if timed.get(place(record), commit(record)) == commit(record)
        else {**record, "training": {"fell_back": record["training"].get("fell_back")}}
        for record in records
    ]  # fmt: skip


def _labels(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Labels of the methods in the registry's order; those of other methods follow."""
    found = {r["cell"]["method"]: r.get("label", r["cell"]["method"]) for r in records}
    order = [name for name in METHODS if name in found] + sorted(found.keys() - METHODS.keys())
    return {name: found[name] for name in order}


def _marked(labels: Mapping[str, str], *groups: Methods) -> tuple[dict[str, str], str]:
    """The labels with a mark where plain NPE was measured at some seed, and the footnote."""
    fell_back = {
        name
        for methods in groups
        for name, seeds in methods.items()
        if any("fell_back" in entry for entry in seeds.values())
    }
    marked = {name: text + " †" * (name in fell_back) for name, text in labels.items()}
    return marked, f"\n\n{FELL_BACK}, at some seeds" if fell_back else ""


def _group(table: Table, group: Group, labels: Mapping[str, str]) -> str:
    """Both tables of one task and budget: values, and differences to NPE."""
    methods = table[group]
    labels, footnote = _marked(labels, methods)
    text = f"### {group[0]}, {group[1]:,} simulations\n\nMean ± standard error over seeds.\n\n"
    text += values_table(methods, labels, _COLUMNS, "method")
    others = [name for name in labels if name in methods and name != BASELINE]
    if BASELINE not in methods or not others:
        return text + footnote
    scores = [metric for metric in SCORES if summarise(methods[BASELINE], metric)]
    rows = [[f"minus {labels[BASELINE]}", *(SCORES[metric] for metric in scores)]]
    for name in others:
        found = [paired_difference(methods[name], methods[BASELINE], m) for m in scores]
        rows.append([labels[name], *map(shown, found)])
    text += "\n\nPaired by seed, 95 % t-interval; less is better.\n\n"
    return text + markdown(rows) + footnote


def _overall(table: Table, labels: Mapping[str, str]) -> str:
    """Means over the tasks that every method has, by budget, C2ST beside coverage."""
    blocks = []
    scores = ("c2st", "coverage_error_90", "leakage", "nll")
    for budget in sorted({budget for _, budget in table}):
        groups = [group for group in sorted(table) if group[1] == budget]
        names = [name for name in labels if any(name in table[group] for group in groups)]
        common = [group for group in groups if all(name in table[group] for name in names)]
        if not common:
            blocks.append(f"{budget:,} simulations: no task that every method has.")
            continue
        marked, footnote = _marked(labels, *(table[group] for group in common))
        rows = [["method", *(SCORES[metric] for metric in scores)]]
        for name in names:
            row = [marked[name]]
            for metric in scores:
                found = [summarise(table[group][name], metric) for group in common]
                row.append(f"{fmean(s.mean for s in found if s):.3f}" if all(found) else "–")
            rows.append(row)
        tasks = ", ".join(task for task, _ in common)
        blocks.append(f"{budget:,} simulations, mean of {tasks}:\n\n{markdown(rows)}{footnote}")
    return "\n\n".join(blocks)


def _verdicts(table: Table, labels: Mapping[str, str]) -> str:
    """Counts over tasks and budgets; a win or loss is an interval that excludes zero."""
    rows, decided = [["method", *SCORES.values()]], False
    for name in (n for n in labels if n != BASELINE):
        row = [labels[name]]
        found = _differences(table, name, BASELINE)
        for metric in SCORES:
            counts = Counter(d.verdict for (_, m), d in found.items() if m == metric)
            known = [counts[verdict] for verdict in ("win", "tie", "loss")]
            row.append(" / ".join(map(str, known)) if any(known) else "–")
            decided |= any(known)
        rows.append(row)
    if not decided:
        return ""
    note = "Wins / ties / losses over tasks and budgets: the paired 95 % interval decides. "
    return note + "Comparisons of one seed have none and are left out.\n\n" + markdown(rows)


def _differences(table: Table, method: str, baseline: str) -> dict[tuple[Group, str], Difference]:
    """Paired differences of a method to a baseline, by group and score."""
    return {
        (group, metric): found
        for group, methods in table.items()
        for metric in SCORES
        if (found := paired_difference(methods.get(method, {}), methods.get(baseline, {}), metric))
    }


def _losses(table: Table, labels: Mapping[str, str]) -> str:
    """Every task, budget and metric where NPE_Jeffreys is worse, beyond noise or in the mean."""
    lines = []
    words = {"loss": "loses", "tie": "worse, within noise", "unknown": "worse"}
    for opponent in (name for name in _STRONG if name in labels):
        found = _differences(table, _OURS, opponent)
        if not found:
            continue
        single = sum(d.verdict == "unknown" for d in found.values())
        worse = sorted((key, d) for key, d in found.items() if d.mean > 0)
        counts = Counter(d.verdict for _, d in worse)
        lines.append(
            f"Against {labels[opponent]}: {counts['loss']} losses in {len(found) - single} "
            f"comparisons; worse in the mean, within noise, in {counts['tie']}; of {single} "
            f"comparisons of one seed, worse in {counts['unknown']}."
        )
        for verdict, word in words.items():
            for ((task, budget), metric), d in worse:
                if d.verdict == verdict:
                    lines.append(f"- {word}: {task}, {budget:,}, {SCORES[metric]}: {d}")
        lines.append("")
    return "\n".join(lines).strip()


def _costs(table: Table, labels: Mapping[str, str]) -> str:
    """Training time and memory relative to NPE, by budget."""
    rows, measured = [["method", "simulations", *_COSTS.values()]], False
    for name in (n for n in labels if n != BASELINE):
        for budget in sorted({budget for _, budget in table}):
            row = [labels[name], f"{budget:,}"]
            for metric in _COSTS:
                ratios = [
                    ratio(methods.get(name, {}), methods.get(BASELINE, {}), metric)
                    for group, methods in table.items()
                    if group[1] == budget
                ]
                known = [r for r in ratios if r is not None]
                row.append(f"{geometric_mean(known):.2f} ×" if known else "–")
                measured |= bool(known)
            rows.append(row)
    if not measured:
        return ""
    note = (
        "Training, relative to NPE: geometric mean over tasks and seeds. Memory is the "
        "resident set at its peak; its growth is over what the process held at the start.\n\n"
    )
    return note + markdown(rows)


def _problems(failed: Sequence[Mapping[str, Any]], corrupt: Sequence[CorruptResultError]) -> str:
    """Failures and corrupt files, if any."""
    lines = [f"- failed: {Cell(**r['cell']).file_name}: {r.get('error')}" for r in failed]
    lines += [f"- corrupt, left out: {error}" for error in corrupt]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `report`."""
    text = f"folder of the cells {DEFAULT}"
    parser.add_argument("--results", type=Path, default=Path("results"), help=text)
    text = f"folder of the report {DEFAULT}"
    parser.add_argument("--out", type=Path, default=Path("report"), help=text)
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Write the report; the exit code."""
    print(f"Report: {write_report(args.results, args.out, show_progress=not args.quiet)}")
    return 0

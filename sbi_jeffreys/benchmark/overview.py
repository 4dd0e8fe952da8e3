"""One row per task, one column per method: accuracy, coverage, and time relative to NPE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

from sbi_jeffreys.benchmark.statistics import (
    Group,
    Methods,
    Seeds,
    average,
    paired_ratios,
    summarise,
)
from sbi_jeffreys.benchmark.tables import markdown, shown

Cell = Callable[
    [Seeds], "str | None"
]  # a method's seeds → its text; None where it was not measured


def task_by_task(
    table: Mapping[Group, Methods], labels: Mapping[str, str], baseline: str
) -> Iterable[str]:
    """The tables of every budget: C2ST, coverage, and processor time over the baseline's."""
    for budget in sorted({budget for _, budget in table}):
        tasks = {task: table[task, budget] for task, other in sorted(table) if other == budget}
        names = [name for name in labels if any(name in methods for methods in tasks.values())]
        columns = {name: labels[name] for name in names}
        blocks = {
            "C2ST: mean over seeds ± its standard error (the worst seed).": _rows(
                tasks, columns, _worst
            ),
            "Share of the true parameters in 50 and in 90 % regions, mean over seeds.": _rows(
                tasks, columns, _coverage
            ),
            f"Processor time over {labels.get(baseline, baseline)}'s, paired by seed: median "
            "(lowest to highest). The last row has the median over tasks.": _times(
                tasks, {n: text for n, text in columns.items() if n != baseline}, baseline
            ),
        }
        found = [f"{title}\n\n{markdown(rows)}" for title, rows in blocks.items() if rows]
        if found:
            yield "\n\n".join([f"### {budget:,} simulations", *found])


def _rows(
    tasks: Mapping[str, Methods], columns: Mapping[str, str], cell: Cell
) -> list[list[str]] | None:
    """One row per task, and the mean of the tasks that every method has, at their common seeds."""
    rows = [
        [task, *(shown(cell(methods.get(name, {}))) for name in columns)]
        for task, methods in tasks.items()
        if any(cell(seeds) for seeds in methods.values())
    ]
    if not rows:
        return None
    common = [
        methods
        for methods in tasks.values()
        if all(name in methods and cell(methods[name]) for name in columns)
    ]
    if len(common) > 1:
        means = [average([methods[name] for methods in common]) for name in columns]
        rows.append([f"**mean of {len(common)}**", *(shown(cell(seeds)) for seeds in means)])
    return [["task", *columns.values()], *rows]


def _worst(seeds: Seeds) -> str | None:
    found = summarise(seeds, "c2st")
    if found is None or found.count == 1:
        return shown(found, ".3f") if found else None
    return f"{found:.3f} ({max(entry['c2st'] for entry in seeds.values() if 'c2st' in entry):.3f})"


def _coverage(seeds: Seeds) -> str | None:
    found = [summarise(seeds, f"coverage_{level}") for level in (50, 90)]
    return " / ".join(f"{s.mean:.2f}" for s in found if s) if all(found) else None


def _times(
    tasks: Mapping[str, Methods], columns: Mapping[str, str], baseline: str
) -> list[list[str]] | None:
    """Ratios of processor times. The median of the tasks stands below them."""
    found = {
        task: {
            name: paired_ratios(
                methods.get(name, {}), methods.get(baseline, {}), "train_cpu_seconds"
            )
            for name in columns
        }
        for task, methods in tasks.items()
    }
    rows = [
        [task, *(_range(ratios[name]) for name in columns)]
        for task, ratios in found.items()
        if any(ratios.values())
    ]
    if not rows:
        return None
    medians = {name: [median(r[name]) for r in found.values() if r[name]] for name in columns}
    last = [f"{median(values):.1f}" if values else "–" for values in medians.values()]
    return [["task", *columns.values()], *rows, ["**median**", *last]]


def _range(ratios: Sequence[float]) -> str:
    if len(ratios) < 2:
        return f"{ratios[0]:.1f}" if ratios else "–"
    return f"{median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"

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

# From a method's seeds to their text; None where it was not measured.
Cell = Callable[[Seeds], "str | None"]


def task_by_task(
    table: Mapping[Group, Methods], labels: Mapping[str, str], baseline: str
) -> Iterable[str]:
    """The tables of every budget: C2ST, coverage, and processor time over the baseline's."""
    for budget in sorted({budget for _, budget in table}):
        tasks = {task: table[task, budget] for task, other in sorted(table) if other == budget}
        names = [name for name in labels if any(name in methods for methods in tasks.values())]
        columns = {name: labels[name] for name in names}
        others = {name: text for name, text in columns.items() if name != baseline}
        over = f"Processor time over {labels.get(baseline, baseline)}'s, paired by seed"
        blocks = {
            "C2ST: mean over seeds ± its standard error (the worst seed).": _rows(
                tasks, columns, _accuracy
            ),
            "Share of the true parameters in 50 and in 90 % regions, mean over seeds.": _rows(
                tasks, columns, _coverage
            ),
            f"{over}: median (lowest to highest). The last row has the median over tasks.": _times(
                tasks, others, baseline
            ),
        }
        found = [f"{title}\n\n{markdown(rows)}" for title, rows in blocks.items() if rows]
        if found:
            yield "\n\n".join([f"### {budget:,} simulations", *found])


def _rows(tasks: Mapping[str, Methods], columns: Mapping[str, str], cell: Cell) -> list[list[str]]:
    """One row per task, and the mean of the tasks that every method has, at their common seeds."""
    found = {
        task: [cell(methods.get(name, {})) for name in columns] for task, methods in tasks.items()
    }
    rows = [[task, *map(shown, row)] for task, row in found.items() if any(row)]
    common = [tasks[task] for task, row in found.items() if all(row)]
    if len(common) > 1:
        means = [average([methods[name] for methods in common]) for name in columns]
        rows.append([f"**mean of {len(common)}**", *(shown(cell(seeds)) for seeds in means)])
    return [["task", *columns.values()], *rows] if rows else []


def _accuracy(seeds: Seeds) -> str | None:
    found = summarise(seeds, "c2st")
    if found is None:
        return None
    worst = max(entry["c2st"] for entry in seeds.values() if "c2st" in entry)
    return f"{found:.3f} ({worst:.3f})" if found.count > 1 else f"{found:.3f}"


def _coverage(seeds: Seeds) -> str | None:
    found = [summarise(seeds, f"coverage_{level}") for level in (50, 90)]
    return " / ".join(f"{s.mean:.2f}" for s in found if s) if all(found) else None


def _times(
    tasks: Mapping[str, Methods], columns: Mapping[str, str], baseline: str
) -> list[list[str]]:
    """Ratios of processor times. The median of the tasks stands below them."""
    metric = "train_cpu_seconds"
    found = {
        task: [
            paired_ratios(methods.get(name, {}), methods.get(baseline, {}), metric)
            for name in columns
        ]
        for task, methods in tasks.items()
    }
    rows = [[task, *map(_range, row)] for task, row in found.items() if any(row)]
    if not rows:
        return []
    medians = [[median(ratios) for ratios in column if ratios] for column in zip(*found.values())]
    last = [shown(median(values) if values else None, ".1f") for values in medians]
    return [["task", *columns.values()], *rows, ["**median**", *last]]


def _range(ratios: Sequence[float]) -> str:
    middle = shown(median(ratios) if ratios else None, ".1f")
    return f"{middle} ({min(ratios):.1f} to {max(ratios):.1f})" if len(ratios) > 1 else middle

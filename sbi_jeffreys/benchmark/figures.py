"""Figures of the report, with the colours and markers of `sbi_jeffreys.diagnostics.drawing`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sbi_jeffreys.benchmark.methods import METHODS
from sbi_jeffreys.benchmark.statistics import Group, Methods, summarise
from sbi_jeffreys.diagnostics.drawing import method_style

#: These methods have the same style as in `diagnostics.plots`: NPE first, then ours.
_FIRST = ("npe_nsf", "npe_jeffreys", "npe_jeffreys_corrected", "ensemble5")

Table = Mapping[Group, Methods]
#: Places, values and standard errors of a method, given its seeds' metrics by budget.
Points = Callable[[dict[int, dict[int, dict[str, float]]]], Iterable[tuple[float, float, float]]]


def style_of(method: str) -> dict[str, Any]:
    """Colour and marker of a method, which are the same in every figure."""
    order = [*_FIRST, *(name for name in METHODS if name not in _FIRST)]
    k = order.index(method) if method in order else len(order)
    return {**method_style(k), "marker": method_style(k + k // 7)["marker"], "markersize": 5}


def saved(path: Path, draw: Callable[[], Any]) -> Path:
    """Draw a figure, write it as PNG and close it."""
    import matplotlib.pyplot as plt

    figure = draw()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return path


def write_figures(
    table: Table, labels: Mapping[str, str], out: Path, show_progress: bool = True
) -> list[Path]:
    """Write all figures as PNG; their paths."""
    figures = {
        "c2st_by_budget": _c2st_by_budget,
        "c2st_by_method": _c2st_by_method,
        "coverage": _coverage,
        "coverage_against_c2st": _coverage_against_c2st,
        "time_against_c2st": _time_against_c2st,
    }
    bar = tqdm(figures.items(), desc="Figures", disable=not show_progress)
    return [saved(out / f"{name}.png", partial(draw, table, labels)) for name, draw in bar]


def _panels(
    table: Table, labels: Mapping[str, str], points: Points, **style: Any
) -> tuple[Any, dict[str, Any]]:
    """A figure with one axis per task, four in a row, the methods' points and one legend."""
    import matplotlib.pyplot as plt

    tasks = sorted({task for task, _ in table})
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    size = (3.4 * columns, 3 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    handles: dict[str, Any] = {}
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for task, axis in zip(tasks, axes.flat):
        axis.set_title(task)
        for method, label in labels.items():
            budgets = {n: table[task, n].get(method, {}) for n in _budgets(table, task)}
            if found := list(points(budgets)):
                place, value, error = zip(*found)
                looks = {**style_of(method), "capsize": 2, **style}
                drawn = axis.errorbar(place, value, yerr=error, label=label, **looks)
                handles.setdefault(label, drawn)
    if handles:
        place = {"loc": "outside lower center", "ncols": 4, "fontsize": 8}
        figure.legend(list(handles.values()), list(handles), **place)
    return figure, dict(zip(tasks, axes.flat))


def _budgets(table: Table, task: str) -> list[int]:
    return sorted(budget for name, budget in table if name == task)


def _c2st_by_budget(table: Table, labels: Mapping[str, str]) -> Any:
    """C2ST over the number of simulations."""
    figure, axes = _panels(
        table,
        labels,
        lambda budgets: (
            (budget, found.mean, found.standard_error)
            for budget, seeds in budgets.items()
            if (found := summarise(seeds, "c2st"))
        ),
    )
    for axis in axes.values():
        axis.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", xlabel="simulations", ylabel="C2ST (0.5 is perfect)")
    return figure


def _c2st_by_method(table: Table, labels: Mapping[str, str]) -> Any:
    """C2ST of each task and their mean, the most accurate method first, at one budget.

    The budget is the one with the most tasks, and of these the largest. Of the tasks that every
    method has there; beside rivals and parts of `NPE_Jeffreys`, it shows where the gain comes from.
    """
    import matplotlib.pyplot as plt

    budget = max((sum(n == m for _, m in table), n) for _, n in table)[1]
    found = {
        task: [summary.mean for m in labels if (summary := summarise(methods.get(m, {}), "c2st"))]
        for (task, n), methods in table.items()
        if n == budget
    }
    rows = zip(labels, zip(*(means for means in found.values() if len(means) == len(labels))))
    ordered = sorted(rows, key=lambda row: sum(row[1]))
    figure, axis = plt.subplots(figsize=(7, 1.5 + 0.4 * len(ordered)), layout="constrained")
    for place, (method, means) in enumerate(ordered):
        style, mean = style_of(method), sum(means) / len(means)
        axis.plot(means, [place] * len(means), **{**style, "linestyle": "", "alpha": 0.4})
        axis.plot(mean, place, **{**style, "markersize": 11})
        axis.annotate(f"{mean:.3f}", (mean, place), (0, 8), textcoords="offset points", ha="center")
    axis.axvline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(ordered)), [labels[method] for method, _ in ordered])
    axis.set_ylim(len(ordered) - 0.5, -0.8)
    axis.set(xlabel=f"C2ST (0.5 is perfect), {budget:,} simulations; large: mean over tasks")
    return figure


def _coverage(table: Table, labels: Mapping[str, str]) -> Any:
    """Empirical minus nominal coverage, over the nominal level, at the largest budget."""
    figure, axes = _panels(
        table,
        labels,
        lambda budgets: (
            (level, found.mean - level / 100, found.standard_error)
            for level in (50, 90, 95)
            if (found := summarise(budgets[max(budgets)], f"coverage_{level}"))
        ),
    )
    for task, axis in axes.items():
        axis.axhline(0, color="grey", linewidth=0.8, linestyle=":")
        axis.set_title(f"{task}, {max(_budgets(table, task)):,}")
        axis.set(xlabel="nominal level, %", ylabel="coverage − nominal\n(< 0: overconfident)")
    return figure


def _c2st_against(
    table: Table, labels: Mapping[str, str], metric: str, text: str
) -> tuple[Any, dict[str, Any]]:
    """C2ST over another metric: one point per method and budget, joined over budgets."""
    figure, axes = _panels(
        table,
        labels,
        lambda budgets: (
            (across.mean, up.mean, 0.0)
            for seeds in budgets.values()
            if (across := summarise(seeds, metric)) and (up := summarise(seeds, "c2st"))
        ),
        linewidth=0.8,
        elinewidth=0,
        capsize=0,
    )
    for axis in axes.values():
        axis.set(xlabel=text, ylabel="C2ST (0.5 is perfect)")
    return figure, axes


def _coverage_against_c2st(table: Table, labels: Mapping[str, str]) -> Any:
    """Coverage and C2ST at once, because either alone can mislead."""
    figure, axes = _c2st_against(table, labels, "coverage_90", "coverage of 90 % HPD regions")
    for axis in axes.values():
        axis.axvline(0.9, color="grey", linewidth=0.8, linestyle=":")
    return figure


def _time_against_c2st(table: Table, labels: Mapping[str, str]) -> Any:
    """What accuracy costs in training time."""
    figure, axes = _c2st_against(table, labels, "train_seconds", "training time, s")
    for axis in axes.values():
        axis.set_xscale("log")
    return figure

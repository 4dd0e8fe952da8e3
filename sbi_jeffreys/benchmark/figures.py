"""Figures of the report, with the colours and markers of `sbi_jeffreys.diagnostics.drawing`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sbi_jeffreys.benchmark.methods import METHODS
from sbi_jeffreys.benchmark.statistics import Group, Methods, Summary, summarise
from sbi_jeffreys.diagnostics.drawing import method_style

__all__ = ["saved", "style_of", "write_figures"]

_LEVELS = (50, 90, 95)
#: Those that are drawn most have the same style as in `diagnostics.plots`: NPE first, then ours.
_FIRST = ("npe_nsf", "npe_jeffreys", "npe_jeffreys_corrected", "ensemble5")

Table = Mapping[Group, Methods]
Points = Callable[[str, str], Iterable[tuple[float, float, float]]]


def style_of(method: str) -> dict[str, Any]:
    """Colour and marker of a method, the same in every figure, whatever else is drawn there."""
    order = [*_FIRST, *(name for name in METHODS if name not in _FIRST)]
    k = order.index(method) if method in order else len(order)
    return {**method_style(k), "marker": method_style(k + k // 7)["marker"], "markersize": 5}


def saved(path: Path, draw: Callable[[], Any]) -> Path:
    """Draw a figure without a display and write it as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = draw()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return path


def write_figures(
    table: Table, labels: Mapping[str, str], out: Path, show_progress: bool = True
) -> list[Path]:
    """Write all figures as PNG; their paths."""
    figures: dict[str, Callable[[], Any]] = {
        "c2st_by_budget": lambda: _c2st_by_budget(table, labels),
        "coverage": lambda: _coverage(table, labels),
        "coverage_against_c2st": lambda: _coverage_against_c2st(table, labels),
        "time_against_c2st": lambda: _time_against_c2st(table, labels),
    }
    bar = tqdm(figures.items(), desc="Figures", disable=not show_progress)
    return [saved(out / f"{name}.png", draw) for name, draw in bar]


def _panels(
    table: Table, labels: Mapping[str, str], points: Points, **style: Any
) -> tuple[Any, dict[str, Any]]:
    """A figure with one axis per task, four in a row, the methods' points and one legend.

    Args:
        table: Says which tasks there are.
        labels: Methods and how the legend calls them.
        points: Of a task and a method: places, values, standard errors.
        style: Of the lines.
    """
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
            if found := list(points(task, method)):
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


def _of(table: Table, task: str, budget: int, method: str, metric: str) -> Summary | None:
    return summarise(table[task, budget].get(method, {}), metric)


def _c2st_by_budget(table: Table, labels: Mapping[str, str]) -> Any:
    """C2ST over the number of simulations."""

    def points(task: str, method: str) -> Iterable[tuple[float, float, float]]:
        for budget in _budgets(table, task):
            if (found := _of(table, task, budget, method, "c2st")) is not None:
                yield budget, found.mean, found.standard_error

    figure, axes = _panels(table, labels, points)
    for axis in axes.values():
        axis.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", xlabel="simulations", ylabel="C2ST (0.5 is perfect)")
    return figure


def _coverage(table: Table, labels: Mapping[str, str]) -> Any:
    """Empirical minus nominal coverage, over the nominal level, at the largest budget."""

    def points(task: str, method: str) -> Iterable[tuple[float, float, float]]:
        budget = max(_budgets(table, task))
        for level in _LEVELS:
            found = _of(table, task, budget, method, f"coverage_{level}")
            if found is not None:
                yield level, found.mean - level / 100, found.standard_error

    figure, axes = _panels(table, labels, points)
    for task, axis in axes.items():
        axis.axhline(0, color="grey", linewidth=0.8, linestyle=":")
        axis.set_title(f"{task}, {max(_budgets(table, task)):,}")
        axis.set(xlabel="nominal level, %", ylabel="coverage − nominal\n(< 0: overconfident)")
    return figure


def _scatter(
    table: Table, labels: Mapping[str, str], metric: str, text: str
) -> tuple[Any, dict[str, Any]]:
    """C2ST over another metric: a point per method and budget, joined over budgets."""

    def points(task: str, method: str) -> Iterable[tuple[float, float, float]]:
        for budget in _budgets(table, task):
            across = _of(table, task, budget, method, metric)
            up = _of(table, task, budget, method, "c2st")
            if across is not None and up is not None:
                yield across.mean, up.mean, 0.0

    figure, axes = _panels(table, labels, points, linewidth=0.8, elinewidth=0, capsize=0)
    for axis in axes.values():
        axis.set(xlabel=text, ylabel="C2ST (0.5 is perfect)")
    return figure, axes


def _coverage_against_c2st(table: Table, labels: Mapping[str, str]) -> Any:
    """Both at once, because either alone can be fooled."""
    figure, axes = _scatter(table, labels, "coverage_90", "coverage of 90 % HPD regions")
    for axis in axes.values():
        axis.axvline(0.9, color="grey", linewidth=0.8, linestyle=":")
    return figure


def _time_against_c2st(table: Table, labels: Mapping[str, str]) -> Any:
    """What accuracy costs."""
    figure, axes = _scatter(table, labels, "train_seconds", "training time, s")
    for axis in axes.values():
        axis.set_xscale("log")
    return figure

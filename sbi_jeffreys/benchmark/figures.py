"""Figures of the report. Colours are Okabe–Ito's, told apart by markers as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sbi_jeffreys.benchmark.statistics import Table, summarise

__all__ = ["write_figures"]

_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")
_LEVELS = (50, 90, 95)


def write_figures(
    table: Table, labels: Mapping[str, str], out: Path, show_progress: bool = True
) -> list[Path]:
    """Write all figures as PNG; their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = []
    for name, draw in tqdm(_FIGURES.items(), desc="Figures", disable=not show_progress):
        figure = draw(table, labels, _Styles(labels))
        path = out / f"{name}.png"
        figure.savefig(path, dpi=120, bbox_inches="tight")
        plt.close(figure)
        paths.append(path)
    return paths


class _Styles:
    """One colour and marker per method, the same in every figure."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self.order = list(labels)

    def __call__(self, method: str) -> dict[str, Any]:
        k = self.order.index(method)
        return {
            "color": _COLOURS[k % len(_COLOURS)],
            "marker": _MARKERS[k % len(_MARKERS)],
            "markersize": 5,
        }


def _panels(table: Table) -> tuple[Any, dict[str, Any]]:
    """A figure with one axis per task, four in a row."""
    import matplotlib.pyplot as plt

    tasks = sorted({task for task, _ in table})
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 3 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for task, axis in zip(tasks, axes.flat):
        axis.set_title(task)
    return figure, dict(zip(tasks, axes.flat))


def _legend(figure: Any, axes: Mapping[str, Any]) -> None:
    """One legend below all panels."""
    entries: dict[str, Any] = {}
    for axis in axes.values():
        for handle, label in zip(*axis.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(
            list(entries.values()), list(entries), loc="outside lower center", ncols=4, fontsize=8
        )


def _c2st_by_budget(table: Table, labels: Mapping[str, str], styles: _Styles) -> Any:
    """C2ST over the number of simulations."""
    figure, axes = _panels(table)
    for task, axis in axes.items():
        budgets = sorted(budget for name, budget in table if name == task)
        for method, label in labels.items():
            found = [(b, summarise(table[task, b].get(method, {}), "c2st")) for b in budgets]
            points = [(b, s.mean, s.standard_error) for b, s in found if s is not None]
            if points:
                budget, mean, error = zip(*points)
                axis.errorbar(budget, mean, yerr=error, label=label, capsize=2, **styles(method))
        axis.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", xlabel="simulations", ylabel="C2ST (0.5 is perfect)")
    _legend(figure, axes)
    return figure


def _coverage(table: Table, labels: Mapping[str, str], styles: _Styles) -> Any:
    """Empirical minus nominal coverage, over the nominal level, at the largest budget."""
    figure, axes = _panels(table)
    for task, axis in axes.items():
        budget = max(budget for name, budget in table if name == task)
        for method, label in labels.items():
            seeds = table[task, budget].get(method, {})
            found = [(level, summarise(seeds, f"coverage_{level}")) for level in _LEVELS]
            points = [(k, s.mean - k / 100, s.standard_error) for k, s in found if s is not None]
            if points:
                level, mean, error = zip(*points)
                axis.errorbar(level, mean, yerr=error, label=label, capsize=2, **styles(method))
        axis.axhline(0, color="grey", linewidth=0.8, linestyle=":")
        axis.set_title(f"{task}, {budget:,}")
        axis.set(xlabel="nominal level, %", ylabel="coverage − nominal\n(< 0: overconfident)")
    _legend(figure, axes)
    return figure


def _scatter(
    table: Table, labels: Mapping[str, str], styles: _Styles, metric: str, text: str
) -> tuple[Any, dict[str, Any]]:
    """C2ST over another metric: a point per method and budget, joined over budgets."""
    figure, axes = _panels(table)
    for task, axis in axes.items():
        budgets = sorted(budget for name, budget in table if name == task)
        for method, label in labels.items():
            points = []
            for budget in budgets:
                seeds = table[task, budget].get(method, {})
                across, up = summarise(seeds, metric), summarise(seeds, "c2st")
                if across is not None and up is not None:
                    points.append((across.mean, up.mean))
            if points:
                axis.plot(*zip(*points), label=label, linewidth=0.8, **styles(method))
        axis.set(xlabel=text, ylabel="C2ST (0.5 is perfect)")
    _legend(figure, axes)
    return figure, axes


def _coverage_against_c2st(table: Table, labels: Mapping[str, str], styles: _Styles) -> Any:
    """Both at once, because either alone can be fooled."""
    figure, axes = _scatter(table, labels, styles, "coverage_90", "coverage of 90 % HPD regions")
    for axis in axes.values():
        axis.axvline(0.9, color="grey", linewidth=0.8, linestyle=":")
    return figure


def _time_against_c2st(table: Table, labels: Mapping[str, str], styles: _Styles) -> Any:
    """What accuracy costs."""
    figure, axes = _scatter(table, labels, styles, "train_seconds", "training time, s")
    for axis in axes.values():
        axis.set_xscale("log")
    return figure


_FIGURES: dict[str, Callable[[Table, Mapping[str, str], _Styles], Any]] = {
    "c2st_by_budget": _c2st_by_budget,
    "coverage": _coverage,
    "coverage_against_c2st": _coverage_against_c2st,
    "time_against_c2st": _time_against_c2st,
}

"""Axes, panels and smaller parts of the figures in `sbi_jeffreys.diagnostics.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_jeffreys._checks import check_instance

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Okabe & Ito's colours, the palest last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
GREY = "#999999"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", "-.", ":")
_FEW = 3  # epochs up to which points are marked


def axes_for(
    name: str,
    given: Any,
    shape: tuple[int, int],
    size: tuple[float, float],
    each: str = "",
    shared: bool = False,
) -> np.ndarray:
    """The axes given, flat and checked; if None, those of a new figure of `size` inches."""
    import matplotlib.pyplot as plt  # here, because importing it chooses a backend
    from matplotlib.axes import Axes

    if given is None:
        options: dict[str, Any] = {"squeeze": False, "sharex": shared, "sharey": shared}
        return plt.subplots(*shape, figsize=size, layout="constrained", **options)[1].ravel()
    count, flat = shape[0] * shape[1], np.asarray(given, dtype=object).ravel()
    for axis in flat:
        check_instance(name, axis, Axes, "pass those of plt.subplots()")
    if flat.size != count:
        raise ValueError(
            f"{name} must be {count} Axes, {each}, got {flat.size}; make them by "
            f"plt.subplots(1, {count})."
        )
    return flat


def held_out_panel(axis: Axes, summary: Mapping[str, Any]) -> None:
    """F on held-out simulations, Ĥ, and the value of the proxy."""
    trace(axis, summary, "held_out_forward", "F, held-out", 0)
    trace(axis, summary, "entropy_estimate", "Ĥ, best so far", 1)
    found = _numbers(summary, "proxy_held_out")
    found = found[np.isfinite(found)]
    if found.size:
        axis.axhline(found[-1], color=COLOURS[2], linestyle=":", label="proxy, held-out")
    axis.set(title="Held-out forward term", ylabel="nats")


def priorities_panel(axis: Axes, summary: Mapping[str, Any]) -> None:
    """λ on the left axis, ε on the right: they differ in unit and by orders of magnitude."""
    trace(axis, summary, "multiplier", "multiplier λ (left)", 0)
    axis.set(title="Priorities", ylabel="λ")
    logarithmic_if_wide(axis)
    if not _numbers(summary, "slack").size:
        return
    right = axis.twinx()
    trace(right, summary, "slack", "slack ε (right)", 1)
    right.set_ylabel("ε, nats", color=COLOURS[1])
    right.tick_params(axis="y", colors=COLOURS[1])
    axis.yaxis.label.set_color(COLOURS[0])
    axis.tick_params(axis="y", which="both", colors=COLOURS[0])
    (drawn,) = axis.plot([], [])  # one legend for both sides
    drawn.update_from(right.get_lines()[0])


def trace(axis: Axes, summary: Mapping[str, Any], key: str, label: str, k: int) -> None:
    """One trace over epochs 1 … n; a marker where there are too few points for a line."""
    values = _numbers(summary, key)
    if values.size:
        style: dict[str, Any] = {"color": COLOURS[k], "linestyle": _LINES[k]}
        if values.size <= _FEW:  # hollow, so that one does not hide another
            style |= {"marker": _MARKERS[k], "fillstyle": "none"}
        axis.plot(np.arange(1, values.size + 1), values, label=label, **style)


def _numbers(summary: Mapping[str, Any], key: str) -> np.ndarray:
    """The values of a key of the summary, which must be numbers; none if the key is missing."""
    values = summary.get(key, ())
    try:
        return np.asarray([float(value) for value in values])
    except (TypeError, ValueError):
        raise TypeError(
            f"summary[{key!r}] must be a list of numbers, got {type(values).__name__} "
            f"({str(values)[:60]}); pass inference.summary as it is."
        ) from None


def logarithmic_if_wide(axis: Axes) -> None:
    """A logarithmic scale where positive values span more than a factor of twenty."""
    drawn = [np.asarray(line.get_ydata(), dtype=float) for line in axis.get_lines()]
    values = np.concatenate(drawn) if drawn else np.empty(0)
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() > 20 * values.min():
        axis.set_yscale("log")


def bars(
    axis: Axes,
    places: np.ndarray,
    values: Sequence[tuple[float, float]],
    colour: str,
    label: str,
    hatch: str,
) -> None:
    """Bars with error bars; a value that is not known (NaN) leaves a gap."""
    heights, errors = np.asarray(values, dtype=float).T
    style: dict[str, Any] = {"color": colour, "edgecolor": "white", "hatch": hatch, "capsize": 4}
    axis.bar(places, np.nan_to_num(heights), 0.38, yerr=errors, label=label, **style)
    text: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 7}
    for place in places[np.isnan(heights)]:
        axis.annotate("not\nknown", (place, 0), (0, 3), **text)


def share_limits(axes: np.ndarray, drawn: Sequence[np.ndarray]) -> None:
    """Give all axes the same limits, set by the bulk: a far draw does not shrink the rest."""
    everything = np.concatenate(drawn)
    low, high = np.quantile(everything, [0.002, 0.998], axis=0)
    margin = 0.12 * np.maximum(high - low, 1e-12)
    for axis in axes:
        axis.set_xlim(low[0] - margin[0], high[0] + margin[0])
        axis.set_ylim(low[1] - margin[1], high[1] + margin[1])


def pairs(
    drawn: Mapping[str, np.ndarray], truth: np.ndarray | None, names: Sequence[str]
) -> np.ndarray:
    """sbi's pairplot over the reference in grey; two methods have a triangle each."""
    from matplotlib import rc_context
    from matplotlib.lines import Line2D
    from sbi.analysis import pairplot

    sets = [*drawn.values()] if truth is None else [truth, *drawn.values()]
    references = len(sets) - len(drawn)
    methods = COLOURS * (1 + len(drawn) // len(COLOURS))
    colours = [GREY] * references + list(methods[: len(drawn)])
    labels = ["reference"] * references + list(drawn)
    above: list[str | None] = ["scatter"] * len(sets)
    below: list[str | None] = [None] * len(sets)
    if len(drawn) == 2 and len(names) > 1:
        above[-1], below = None, ["scatter"] * references + [None, "scatter"]
        labels[-2:] = [f"{labels[-2]} (above)", f"{labels[-1]} (below)"]
    points = [{"mpl_kwargs": {"s": 3, "color": c, "edgecolor": "none"}} for c in colours]
    options: dict[str, Any] = {
        "labels": list(names),
        "diag": "kde",
        "upper": above,
        "lower": below,
        "figsize": (max(4.0, 2.0 * len(names)),) * 2,
        "diag_kwargs": [{"mpl_kwargs": {"color": c}} for c in colours],
        "upper_kwargs": points,
        "lower_kwargs": points,
    }
    with rc_context():  # sbi's pairplot changes matplotlib's style
        result: Any = pairplot(sets, **options)
    figure, grid = result
    place: dict[str, Any] = {"loc": "lower center", "ncols": min(3, len(labels))}
    if len(names) == 1:
        figure.subplots_adjust(bottom=0.18)  # sbi leaves no room for a single panel's label
        place = {"loc": "upper right"}
    else:  # labels of the lowest panels, and the legend below them
        figure.subplots_adjust(bottom=1.0 / figure.get_figheight())
    handles = [Line2D([], [], color=c, label=label) for c, label in zip(colours, labels)]
    figure.legend(handles=handles, frameon=False, fontsize=9, **place)
    return np.asarray(grid, dtype=object)


def method_style(k: int) -> dict[str, Any]:
    """Colour and marker of the k-th method."""
    return {"color": COLOURS[k % len(COLOURS)], "marker": _MARKERS[k % len(_MARKERS)]}


def epoch_axis(axis: Axes, epochs: int) -> None:
    """Ticks at whole epochs, which are counted from 1; a note if there was no symmetric stage."""
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("epoch of the symmetric stage")
    if not epochs:
        axis.text(0.5, 0.5, "no symmetric stage", ha="center", transform=axis.transAxes)
        axis.set(xlim=(0.5, 1.5), xticks=[], yticks=[])
    elif epochs <= _FEW:
        axis.set_xlim(0.5, epochs + 0.5)
        axis.set_xticks(range(1, epochs + 1))
    else:
        axis.set_xlim(0, epochs + 0.5)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def legend(axis: Axes, **kwargs: Any) -> None:
    """A small legend, where there is something to name."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, frameon=False, **kwargs)

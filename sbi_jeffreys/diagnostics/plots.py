"""Figures of a training and of its diagnostics: matplotlib axes in, axes out.

Every function draws on the axes it is given, or makes its own figure, and returns the axes.
Colours are Okabe and Ito's, which readers with any colour vision can tell apart; markers or line
styles differ together with the colours. Nothing here changes matplotlib's global state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from scipy.stats import sem
from torch import Tensor

from sbi_jeffreys._checks import check_instance
from sbi_jeffreys.diagnostics import _arguments, drawing
from sbi_jeffreys.diagnostics.calibration import CoverageCurve
from sbi_jeffreys.diagnostics.drawing import COLOURS, GREY, axes_for, legend
from sbi_jeffreys.diagnostics.report import HeldOutReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "COLOURS",
    "plot_c2st_against_budget",
    "plot_coverage",
    "plot_divergences",
    "plot_posteriors",
    "plot_training",
]

#: What coverage is drawn from: one report or curve, or several by the name of their method.
Curves: TypeAlias = "HeldOutReport | CoverageCurve | Mapping[str, HeldOutReport | CoverageCurve]"


def plot_training(
    summary: Mapping[str, Any], axes: Sequence[Axes] | np.ndarray | None = None
) -> np.ndarray:
    """Traces of the symmetric stage, by epoch.

    The panels show the forward terms in training; the forward term on held-out simulations with the
    entropy estimate Ĥ that bounds it; the reverse terms; and multiplier λ with slack ε. Without a
    symmetric stage, as in the summary of sbi's NPE, the panels are empty and say so.

    Args:
        summary: `NPE_Jeffreys.summary` after training, or of a loaded object.
        axes: Four axes; a new 2 × 2 figure if None.

    Returns:
        The four axes, shape `(4,)`.

    Raises:
        TypeError: If the summary is no mapping, or a trace in it does not consist of numbers.
        ValueError: If the number of axes is not four.
    """
    check_instance("summary", summary, Mapping, "pass inference.summary")
    drawn = axes_for("axes", axes, (2, 2), (9.0, 6.4), "one per panel")
    terms, held_out, reverse, priorities = drawn
    drawing.trace(terms, summary, "forward_term", "F, on simulations", 0)
    drawing.trace(terms, summary, "generated_term", "G, on the proxy's draws", 1)
    terms.set(title="Forward terms, training", ylabel="nats")
    drawing.held_out_panel(held_out, summary)
    divergence = r"$\mathrm{KL}(p_\varphi \Vert q_\psi)$, held-out x"
    drawing.trace(reverse, summary, "held_out_reverse", divergence, 0)
    drawing.trace(reverse, summary, "reverse_term", "loss in training", 1)
    reverse.set(title="Reverse terms", ylabel="nats")
    drawing.logarithmic_if_wide(reverse)
    drawing.priorities_panel(priorities, summary)
    epochs = len(summary.get("held_out_forward", []))
    for axis in drawn:
        drawing.epoch_axis(axis, epochs)
        legend(axis)
    return drawn


def plot_coverage(curves: Curves, ax: Axes | None = None) -> Axes:
    """Expected coverage of the HPD regions over their nominal level.

    A posterior whose curve is below the diagonal is overconfident, and one whose curve is above it
    conservative. At each level, the coverage of an exact posterior is in the band with 99 %
    probability.

    Args:
        curves: A report or curve, or several by the name of their method.
        ax: Where to draw; a new figure if None.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If there is no curve.
    """
    given = _arguments.by_name("curves", curves, (HeldOutReport, CoverageCurve), "")
    named = {k: v.coverage if isinstance(v, HeldOutReport) else v for k, v in given.items()}
    axis = axes_for("ax", ax, (1, 1), (4.6, 4.4)).item()
    fewest = min(named.values(), key=lambda curve: curve.num_pairs)
    band = (fewest.levels.numpy(), fewest.lower.numpy(), fewest.upper.numpy())
    label = f"99 % band of {fewest.num_pairs:,} pairs"
    axis.fill_between(*band, color=GREY, alpha=0.3, label=label, lw=0)
    axis.plot([0, 1], [0, 1], color=GREY, linewidth=1, zorder=1)
    for k, (name, curve) in enumerate(named.items()):
        style = drawing.method_style(k) | {"markersize": 4}
        style["markevery"] = max(1, len(curve.levels) // 8)
        axis.plot(curve.levels.numpy(), curve.values.numpy(), label=name or "posterior", **style)
    axis.set(xlabel="nominal level", ylabel="expected coverage", xlim=(0, 1), ylim=(0, 1))
    axis.set_aspect("equal")
    legend(axis, loc="upper left")
    return axis


def plot_divergences(
    reports: HeldOutReport | Mapping[str, HeldOutReport], ax: Axes | None = None
) -> Axes:
    """Forward NLL above the best method's, and reverse KL, with standard errors.

    The forward term is known only up to the entropy of π, so its bars start at the best method:
    their heights are differences of KL(π‖p_φ), in nats like the reverse KL. All reports must be on
    the same held-out pairs. An error bar is that of one method, not of a difference.

    Args:
        reports: A report, or several by the name of their method.
        ax: Where to draw; a new figure if None.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If there is no report.
    """
    named = _arguments.by_name("reports", reports, (HeldOutReport,), "posterior")
    axis = axes_for("ax", ax, (1, 1), (max(4.0, 1.5 * len(named) + 1.5), 3.8)).item()
    best = min(report.forward for report in named.values())
    places = np.arange(len(named))
    forward = [(r.forward - best, r.forward_error) for r in named.values()]
    reverse = [
        (math.nan if r.reverse is None else r.reverse, r.reverse_error or math.nan)
        for r in named.values()
    ]
    label = f"forward NLL above the best, {best:.2f}"
    drawing.bars(axis, places - 0.2, forward, COLOURS[0], label, "")
    known = any(r.reverse is not None for r in named.values())
    label = "reverse KL to the proxy" if known else "reverse KL to the proxy (no proxy)"
    drawing.bars(axis, places + 0.2, reverse, COLOURS[1], label, "//")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(places, list(named), rotation=20 if len(named) > 3 else 0)
    axis.set_ylabel("nats (± standard error)")
    axis.margins(y=0.15)
    legend(axis)
    return axis


def plot_c2st_against_budget(rows: Iterable[Mapping[str, Any]], ax: Axes | None = None) -> Axes:
    """C2ST over the number of simulations, one line per method.

    Args:
        rows: Each with `method`, `simulations` and `c2st`; several of the same method and budget
            (seeds, observations) become their mean with its standard error.
        ax: Where to draw; a new figure if None.

    Raises:
        TypeError: If the rows are no mappings, or a value in them is no number.
        ValueError: If there is no row, a key is missing, or a value is out of range.
    """
    scores = _arguments.c2st_scores(rows)
    axis = axes_for("ax", ax, (1, 1), (5.2, 3.8)).item()
    for k, (method, budgets) in enumerate(scores.items()):
        sizes = sorted(budgets)
        means = [float(np.mean(budgets[size])) for size in sizes]
        errors = [sem(budgets[size]) if len(budgets[size]) > 1 else 0.0 for size in sizes]
        style = drawing.method_style(k)
        axis.errorbar(sizes, means, yerr=errors, label=method, capsize=3, **style)
    axis.axhline(0.5, color=GREY, linewidth=1, zorder=1)
    every = sorted({size for budgets in scores.values() for size in budgets})
    axis.set_xscale("log")
    if len(every) <= 8:  # the budgets themselves are more useful than powers of ten
        axis.set_xticks(every, [f"{size:,.0f}" for size in every])
        axis.minorticks_off()
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 0.48), min(high, 1.02))
    axis.set(xlabel="simulations", ylabel="C2ST (0.5: cannot be told apart)")
    legend(axis)
    return axis


def plot_posteriors(
    samples: Mapping[str, Tensor],
    reference: Tensor | None = None,
    axes: Sequence[Axes] | np.ndarray | None = None,
    dims: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
) -> np.ndarray:
    """Posterior samples of several methods at one observation.

    Two parameters give a scatter plot per method, side by side on the same limits, with the
    reference in grey beneath. Any other number gives sbi's pairplot, methods overlaid, in a figure
    of its own.

    Args:
        samples: By the name of the method, `(N, D)` each.
        reference: Samples of the true posterior, `(M, D)`, if known.
        axes: One per method, for two parameters; a new figure if None.
        dims: Which parameters; the first five at most if None.
        labels: Names of those parameters; θ₁, θ₂, … if None.

    Returns:
        The axes, `(methods,)`, or the pairplot's grid.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If shapes, dims, labels or axes do not fit each other.
    """
    kept = _arguments.check_dims(dims, _arguments.check_samples(samples, reference))
    names = _arguments.check_labels(labels, kept)
    drawn = {name: np.asarray(values[:, kept].cpu()) for name, values in samples.items()}
    truth = None if reference is None else np.asarray(reference[:, kept].cpu())
    if len(kept) != 2:
        if axes is not None:
            raise ValueError(
                f"axes must be None for a pairplot, got axes for {len(kept)} parameters, which "
                "need a figure of their own; pass dims=(i, j) to draw two of them on these axes, "
                "or leave axes out."
            )
        return drawing.pairs(drawn, truth, names)
    shape, size = (1, len(drawn)), (3.6 * len(drawn), 3.8)
    flat = axes_for("axes", axes, shape, size, "one per method", shared=True)
    for k, (axis, (name, values)) in enumerate(zip(flat, drawn.items())):
        if truth is not None:
            axis.scatter(*truth.T, s=8, color="#BBBBBB", linewidths=0, label="reference")
        axis.scatter(*values.T, s=4, color=COLOURS[k % len(COLOURS)], linewidths=0, alpha=0.7)
        axis.set(title=name, xlabel=names[0], ylabel=names[1] if k == 0 else "")
    drawing.share_limits(flat, [*drawn.values(), *([] if truth is None else [truth])])
    if truth is not None:
        legend(flat[0], loc="best", markerscale=3)
    return flat

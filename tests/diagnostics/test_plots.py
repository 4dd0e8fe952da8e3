"""Plots: what is drawn is what was given, on the axes that were given, and nothing else changes."""

import copy
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch

mpl.use("Agg")
import matplotlib.pyplot as plt

from sbi_jeffreys import HeldOutReport
from sbi_jeffreys.diagnostics.calibration import coverage_curve
from sbi_jeffreys.diagnostics.plots import (
    plot_c2st_against_budget,
    plot_coverage,
    plot_divergences,
    plot_posteriors,
    plot_training,
)
from sbi_jeffreys.npe import TRACES


@pytest.fixture(autouse=True)
def _nothing_global_changes():
    plt.close("all")  # what tests of other files have left open
    before = copy.deepcopy(dict(mpl.rcParams))
    yield
    assert dict(mpl.rcParams) == before
    plt.close("all")


def summary(epochs=30):
    steps = np.arange(epochs)
    traces = {name: list(2.0 + k + np.exp(-steps / 9)) for k, name in enumerate(TRACES)}
    return traces | {"proxy": ["fitted"], "proxy_held_out": [1.7]}


def report(power=1.0, forward=6.0, reverse: float | None = 0.4):
    ranks = torch.rand(300).double() ** power
    error = None if reverse is None else 0.05
    curve = coverage_curve(ranks)
    return HeldOutReport(
        300, 100, forward, 0.1, reverse, error, 0.5, curve, torch.rand(300, 2), 0.0, (), 300
    )


def line(axis, label):
    """The line of that label: labels are part of what a figure says."""
    (found,) = [line for line in axis.get_lines() if line.get_label().startswith(label)]
    return found


def test_importing_plots_changes_no_settings_and_imports_nothing_above():
    code = (
        "import sys, matplotlib as m, sbi.inference; b = dict(m.rcParams); "
        "import sbi_jeffreys.diagnostics.plots; "
        "print(b == dict(m.rcParams), 'sbi_jeffreys.benchmark' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_training_draws_every_trace_over_epochs_from_one(epochs):
    given = summary(epochs)
    axes = plot_training(given)
    assert axes.shape == (4,)
    wanted = (
        (axes[0], "F, on simulations", "forward_term"),
        (axes[0], "G, on", "generated_term"),
        (axes[1], "F, held-out", "held_out_forward"),
        (axes[1], "Ĥ", "entropy_estimate"),
        (axes[2], "loss", "reverse_term"),
        (axes[3], "multiplier", "multiplier"),
    )
    for axis, label, key in wanted:
        drawn = line(axis, label)
        assert list(drawn.get_xdata()) == list(range(1, epochs + 1))
        assert list(drawn.get_ydata()) == given[key]
    assert all("epoch" in axis.get_xlabel() for axis in axes)
    assert all("nats" in axis.get_ylabel() for axis in axes[:3])
    assert list(line(axes[1], "proxy").get_ydata()) == [1.7, 1.7]
    right = [axis for axis in axes[0].figure.axes if axis not in list(axes)]
    assert list(line(right[0], "slack").get_ydata()) == given["slack"]
    assert all(float(t).is_integer() for t in axes[0].get_xticks())


def test_training_on_given_axes_and_wrong_numbers_of_them():
    figure, axes = plt.subplots(1, 4)
    assert list(plot_training(summary(), axes)) == list(axes)
    assert len(plt.get_fignums()) == 1
    with pytest.raises(ValueError, match=r"axes must be 4 Axes.*got 3"):
        plot_training(summary(), axes[:3])
    figure.canvas.draw()


def test_training_without_a_symmetric_stage_says_so():
    axes = plot_training({name: [] for name in summary()})
    assert all("no symmetric stage" in axis.texts[0].get_text() for axis in axes)
    axes[0].figure.canvas.draw()


def test_wide_ranges_are_logarithmic_and_negative_ones_are_not():
    wide = summary()
    wide["multiplier"] = list(np.geomspace(0.05, 100, 30))
    assert plot_training(wide)[3].get_yscale() == "log"
    wide["multiplier"][0] = -1.0
    assert plot_training(wide)[3].get_yscale() == "linear"


def test_coverage_takes_one_or_several_reports_or_curves():
    one = report()
    axis = plot_coverage(one)
    assert np.allclose(line(axis, "posterior").get_ydata(), one.coverage.values)
    _, given = plt.subplots()
    several = {"NPE": report(0.5), "ours": one.coverage}
    assert plot_coverage(several, given) is given
    assert np.allclose(line(given, "ours").get_ydata(), one.coverage.values)
    assert "300 pairs" in given.get_legend().get_texts()[0].get_text()
    colours = {line(given, name).get_color() for name in several}
    assert len(colours) == 2
    with pytest.raises(ValueError, match="at least one"):
        plot_coverage({})


def test_divergences_start_at_the_best_and_leave_gaps():
    axis = plot_divergences({"NPE": report(forward=8.5, reverse=None), "ours": report()})
    heights = [bar.get_height() for bar in axis.patches]
    assert heights == pytest.approx([2.5, 0.0, 0.0, 0.4])
    assert "not" in axis.texts[0].get_text()
    assert "nats" in axis.get_ylabel()
    assert [t.get_text() for t in axis.get_xticklabels()] == ["NPE", "ours"]
    assert "no proxy" in plot_divergences(report(reverse=None)).get_legend().get_texts()[1]._text
    with pytest.raises(ValueError, match="at least one"):
        plot_divergences({})


def test_c2st_is_averaged_over_rows_of_the_same_budget():
    rows = [
        {"method": m, "simulations": n, "c2st": c + d}
        for m, c in (("NPE", 0.9), ("ours", 0.8))
        for n in (10_000, 1_000)
        for d in (-0.02, 0.02)
    ]
    axis = plot_c2st_against_budget(rows)
    containers = {c.get_label(): c for c in axis.containers}
    drawn = containers["ours"].lines[0]
    assert list(drawn.get_xdata()) == [1_000, 10_000]
    assert list(drawn.get_ydata()) == pytest.approx([0.8, 0.8])
    assert axis.get_xscale() == "log"
    assert [t.get_text() for t in axis.get_xticklabels()] == ["1,000", "10,000"]
    with pytest.raises(ValueError, match="at least one"):
        plot_c2st_against_budget([])


def test_two_parameters_are_scattered_side_by_side_on_the_same_limits():
    samples = {"NPE": torch.randn(200, 2), "ours": 3 * torch.randn(200, 2)}
    axes = plot_posteriors(samples, torch.randn(100, 2))
    assert [axis.get_title() for axis in axes] == ["NPE", "ours"]
    assert axes[0].get_xlim() == axes[1].get_xlim()
    reference, drawn = axes[1].collections
    assert len(reference.get_offsets()) == 100
    assert np.allclose(drawn.get_offsets(), samples["ours"])
    _, given = plt.subplots(1, 2)
    assert list(plot_posteriors(samples, axes=given)) == list(given)
    with pytest.raises(ValueError, match="one per method"):
        plot_posteriors(samples, axes=given[:1])


def test_more_parameters_are_sbis_pairplot_or_two_chosen_ones():
    samples = {"NPE": torch.randn(100, 7), "ours": torch.randn(100, 7)}
    grid = plot_posteriors(samples, torch.randn(100, 7), dims=(0, 2, 4))
    assert grid.shape == (3, 3)
    _, given = plt.subplots(1, 2)
    axes = plot_posteriors(samples, axes=given, dims=(3, 6))
    assert np.allclose(axes[0].collections[0].get_offsets(), samples["NPE"][:, [3, 6]])
    with pytest.raises(ValueError, match="dims="):
        plot_posteriors(samples, axes=given)
    with pytest.raises(ValueError, match="at least one"):
        plot_posteriors({})


def test_three_methods_and_one_parameter():
    samples = {name: torch.randn(100, 1) for name in "abc"}
    assert plot_posteriors(samples).size == 1
    assert plot_posteriors({k: v.repeat(1, 3) + v for k, v in samples.items()}).shape == (3, 3)

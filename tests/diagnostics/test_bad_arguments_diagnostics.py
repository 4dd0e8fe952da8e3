"""Bad arguments of reports, calibration and figures: refused by name, with what came."""

import math

import matplotlib as mpl
import numpy as np
import pytest
import torch
from contract_tools import refused
from known_posteriors import PRIOR, Known, gaussian, log_likelihood, pairs
from sbi.inference.posteriors import DirectPosterior, EnsemblePosterior, MCMCPosterior

from sbi_jeffreys import GivenProxy, HeldOutReport, diagnostics, held_out_report
from sbi_jeffreys.diagnostics import PairDraws, coverage_curve
from sbi_jeffreys.diagnostics.verdicts import judge
from sbi_jeffreys.posteriors.focused import Focus, FocusedPosterior
from sbi_jeffreys.posteriors.importance import ImportanceQuality

mpl.use("Agg")
import matplotlib.pyplot as plt

pytestmark = pytest.mark.filterwarnings("ignore:.*no parameters/buffers")

THETA, XS = torch.zeros(60, 2), torch.zeros(60, 2)
RANKS = torch.linspace(0.01, 0.99, 60)
CURVE = coverage_curve(RANKS)
REPORT = HeldOutReport(
    60, 50, 1.0, 0.1, None, None, None, CURVE, RANKS.repeat(2, 1).T.contiguous(), 0.0, (), 60
)
DRAWS = PairDraws(torch.zeros(5, 3, 2), torch.zeros(5, 3), torch.zeros(3))
INSIDE = torch.ones(5, 3, dtype=torch.bool)
SAMPLES = {"NPE": torch.randn(50, 2), "ours": torch.randn(50, 2)}
ROW = {"method": "NPE", "simulations": 1_000, "c2st": 0.7}


def posterior():
    return DirectPosterior(Known(gaussian()), PRIOR)


def focused():
    found = Focus(*[ImportanceQuality(1.0, 0.0, 100)] * 2, 1.0, False)
    return FocusedPosterior(Known(gaussian()), PRIOR, torch.zeros(1, 2), found)


def report(theta=THETA, x=XS, subject=None, **kwargs):
    return held_out_report(posterior() if subject is None else subject, theta, x, **kwargs)


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda: report(theta=None), TypeError, ("theta must", "NoneType")),
        (lambda: report(theta=[[0.0, 0.0]] * 60), TypeError, ("theta must", "list")),
        (lambda: report(theta=THETA.numpy()), TypeError, ("theta must", "ndarray")),
        (lambda: report(theta=THETA.long()), TypeError, ("theta must", "int64")),
        (lambda: report(theta=THETA[:, 0]), ValueError, ("theta must", "(60,)", "reshape")),
        (lambda: report(theta=THETA[:20], x=XS[:20]), ValueError, ("theta and x", "got 20")),
        (lambda: report(theta=torch.zeros(60, 3)), ValueError, ("theta must", "(60, 3)")),
        (lambda: report(x=None), TypeError, ("x must", "NoneType")),
        (lambda: report(x=XS.tolist()), TypeError, ("x must", "list")),
        (lambda: report(x=XS.numpy()), TypeError, ("x must", "ndarray")),
        (lambda: report(x=XS.bool()), TypeError, ("x must", "torch.bool")),
        (lambda: report(x=XS[:, 0]), ValueError, ("theta and x", "(60,)")),
        (lambda: report(x=torch.zeros(59, 2)), ValueError, ("theta and x", "(59, 2)")),
        (lambda: report(x=torch.zeros(60, 5)), ValueError, ("x must", "(60, 5)")),
        (lambda: report(x=XS + math.inf), ValueError, ("theta and x", "60 of 60", "drop")),
        (lambda: report(num_samples=5), ValueError, ("num_samples must", "got 5")),
        (lambda: report(num_samples=100.0), TypeError, ("num_samples must", "float")),
        (lambda: report(num_samples=None), TypeError, ("num_samples must", "NoneType")),
        (lambda: report(proxy="likelihood"), TypeError, ("proxy must", "str")),
        (lambda: report(proxy=log_likelihood), TypeError, ("proxy must", "function")),
        (lambda: report(show_progress_bars=1), TypeError, ("show_progress_bars must", "int (1)")),
        (lambda: report(subject=PRIOR), TypeError, ("inference_or_posterior", "Multivariate")),
        (lambda: report(subject="nsf"), TypeError, ("inference_or_posterior", "str")),
        (lambda: report(subject=MCMCPosterior), TypeError, ("inference_or_posterior", "got")),
        (
            lambda: report(subject=focused()),
            TypeError,
            ("FocusedPosterior", "one observation", "build_posterior()"),
        ),
        (
            lambda: report(subject=EnsemblePosterior([posterior(), focused()])),
            TypeError,
            ("EnsemblePosterior with a FocusedPosterior", "each of them must"),
        ),
        (
            lambda: report(
                subject=EnsemblePosterior([posterior(), posterior()]),
                proxy=GivenProxy(PRIOR, log_likelihood),
            ),
            ValueError,
            ("proxy must be None", "GivenProxy"),
        ),
    ],
)
def test_report(call, error, parts):
    refused(call, error, *parts)


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda: PairDraws(None, RANKS, RANKS), TypeError, ("theta must", "NoneType")),
        (
            lambda: PairDraws(torch.zeros(5, 2), torch.zeros(5), RANKS),
            ValueError,
            ("theta must", "(5, 2)"),
        ),
        (
            lambda: PairDraws(torch.zeros(5, 3, 2), torch.zeros(3, 5), torch.zeros(3)),
            ValueError,
            ("log_prob must", "(5, 3)", "(3, 5)"),
        ),
        (
            lambda: PairDraws(torch.zeros(5, 3, 2), torch.zeros(5, 3), torch.zeros(5)),
            ValueError,
            ("log_prob_true must", "(3)", "(5,)"),
        ),
        (
            lambda: PairDraws(torch.zeros(5, 3, 2), torch.zeros(5, 3), torch.zeros(3), RANKS),
            ValueError,
            ("log_weights must", "(60,)"),
        ),
        (
            lambda: PairDraws(torch.zeros(5, 3, 2), torch.zeros(5, 3), torch.zeros(3), None, 1),
            TypeError,
            ("normalised must", "int (1)"),
        ),
        (lambda: diagnostics.inside_prior(None, THETA), TypeError, ("prior must", "NoneType")),
        (lambda: diagnostics.inside_prior(PRIOR, [0.0]), TypeError, ("theta must", "list")),
        (
            lambda: diagnostics.inside_prior(PRIOR, torch.tensor(0.0)),
            ValueError,
            ("theta must", "()"),
        ),
        (lambda: diagnostics.leakage([True]), TypeError, ("inside must", "list")),
        (lambda: diagnostics.leakage(torch.zeros(3)), TypeError, ("inside must", "float32")),
        (lambda: diagnostics.leakage(INSIDE[:0]), ValueError, ("inside must", "(0, 3)")),
        (lambda: diagnostics.held_out_nll([1.0]), TypeError, ("log_prob_true must", "list")),
        (
            lambda: diagnostics.held_out_nll(torch.zeros(3, 2)),
            ValueError,
            ("log_prob_true must", "(3, 2)"),
        ),
        (
            lambda: diagnostics.held_out_nll(torch.zeros(0)),
            ValueError,
            ("log_prob_true must", "none"),
        ),
        (lambda: diagnostics.hpd_ranks(None, INSIDE), TypeError, ("draws must", "NoneType")),
        (lambda: diagnostics.hpd_ranks(DRAWS, INSIDE.T), ValueError, ("inside must", "(3, 5)")),
        (lambda: diagnostics.hpd_ranks(DRAWS, INSIDE, 0), TypeError, ("randomised must", "int")),
        (
            lambda: diagnostics.marginal_ranks(DRAWS, torch.zeros(3, 4), INSIDE),
            ValueError,
            ("theta_true must", "(3, 4)"),
        ),
        (
            lambda: diagnostics.expected_coverage(DRAWS, INSIDE, (0.5, 1.0)),
            ValueError,
            ("levels must", "got 1.0"),
        ),
        (
            lambda: diagnostics.expected_coverage(DRAWS, INSIDE, ()),
            ValueError,
            ("levels must", "got none"),
        ),
        (lambda: coverage_curve(RANKS, 0.5), TypeError, ("levels must", "float (0.5)")),
        (lambda: coverage_curve(RANKS, ["half"]), TypeError, ("levels must", "str ('half')")),
        (lambda: coverage_curve(RANKS, [math.nan]), ValueError, ("levels must", "nan")),
        (lambda: coverage_curve(None), TypeError, ("ranks must", "NoneType")),
        (lambda: coverage_curve(torch.zeros(0)), ValueError, ("ranks must", "none")),
        (lambda: judge(RANKS, RANKS, 0.0, 50), ValueError, ("marginals must", "(60,)")),
        (lambda: judge(RANKS, RANKS[:, None], 2.0, 50), ValueError, ("leakage must", "got 2.0")),
        (lambda: judge(RANKS, RANKS[:, None], 0.0, 0), ValueError, ("num_samples", "got 0")),
    ],
)
def test_calibration(call, error, parts):
    refused(call, error, *parts)


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda p: p.plot_training(None), TypeError, ("summary must", "NoneType", "summary")),
        (lambda p: p.plot_training([1.0]), TypeError, ("summary must", "list")),
        (
            lambda p: p.plot_training({"multiplier": ["a"]}),
            TypeError,
            ("summary['multiplier'] must", "list"),
        ),
        (
            lambda p: p.plot_training({"slack": 3}),
            TypeError,
            ("summary['slack'] must", "int (3)"),
        ),
        (lambda p: p.plot_training({}, 4), TypeError, ("axes must", "int")),
        (lambda p: p.plot_training({}, "axes"), TypeError, ("axes must", "str")),
        (lambda p: p.plot_training({}, plt.subplots(1, 3)[1]), ValueError, ("axes must", "got 3")),
        (lambda p: p.plot_coverage(None), TypeError, ("curves must", "NoneType")),
        (lambda p: p.plot_coverage([CURVE]), TypeError, ("curves must", "list")),
        (lambda p: p.plot_coverage({}), ValueError, ("curves must", "got none")),
        (lambda p: p.plot_coverage({"a": RANKS}), TypeError, ("curves['a'] must", "Tensor")),
        (lambda p: p.plot_coverage({1: CURVE}), TypeError, ("keys of curves must", "int")),
        (lambda p: p.plot_coverage(CURVE, 3), TypeError, ("ax must", "int")),
        (lambda p: p.plot_coverage(CURVE, plt.figure()), TypeError, ("ax must", "Figure")),
        (lambda p: p.plot_divergences(None), TypeError, ("reports must", "NoneType")),
        (lambda p: p.plot_divergences(CURVE), TypeError, ("reports must", "CoverageCurve")),
        (lambda p: p.plot_divergences({}), ValueError, ("reports must", "got none")),
        (lambda p: p.plot_divergences({"a": CURVE}), TypeError, ("reports['a'] must", "Curve")),
        (lambda p: p.plot_divergences(REPORT, "ax"), TypeError, ("ax must", "str")),
        (lambda p: p.plot_c2st_against_budget(None), TypeError, ("rows must", "NoneType")),
        (lambda p: p.plot_c2st_against_budget([]), ValueError, ("rows must", "got none")),
        (lambda p: p.plot_c2st_against_budget([3]), TypeError, ("rows[0] must", "int")),
        (
            lambda p: p.plot_c2st_against_budget([ROW, {"method": "NPE", "c2st": 0.6}]),
            ValueError,
            ("rows[1] must", "simulations"),
        ),
        (
            lambda p: p.plot_c2st_against_budget([ROW | {"c2st": "good"}]),
            TypeError,
            ("rows[0]['c2st'] must", "str"),
        ),
        (
            lambda p: p.plot_c2st_against_budget([ROW | {"c2st": 7.0}]),
            ValueError,
            ("rows[0]['c2st'] must", "got 7.0"),
        ),
        (
            lambda p: p.plot_c2st_against_budget([ROW | {"c2st": math.nan}]),
            ValueError,
            ("rows[0]['c2st'] must", "nan"),
        ),
        (
            lambda p: p.plot_c2st_against_budget([ROW | {"simulations": 0}]),
            ValueError,
            ("rows[0]['simulations'] must", "got 0"),
        ),
        (lambda p: p.plot_c2st_against_budget([ROW], 1), TypeError, ("ax must", "int")),
        (lambda p: p.plot_posteriors(None), TypeError, ("samples must", "NoneType")),
        (lambda p: p.plot_posteriors(SAMPLES["NPE"]), TypeError, ("samples must", "Tensor")),
        (lambda p: p.plot_posteriors({}), ValueError, ("samples must", "got none")),
        (
            lambda p: p.plot_posteriors({"NPE": np.zeros((9, 2))}),
            TypeError,
            ("samples['NPE'] must", "ndarray"),
        ),
        (
            lambda p: p.plot_posteriors({"NPE": torch.zeros(9)}),
            ValueError,
            ("samples['NPE'] must", "(9,)"),
        ),
        (
            lambda p: p.plot_posteriors(SAMPLES | {"ours": torch.zeros(9, 3)}),
            ValueError,
            ("samples['ours'] must", "(9, 3)"),
        ),
        (
            lambda p: p.plot_posteriors({"NPE": torch.zeros(0, 2)}),
            ValueError,
            ("samples['NPE'] must", "(0, 2)"),
        ),
        (
            lambda p: p.plot_posteriors({"NPE": torch.full((9, 2), math.nan)}),
            ValueError,
            ("samples['NPE'] must be finite", "18 of 18"),
        ),
        (
            lambda p: p.plot_posteriors(SAMPLES, torch.zeros(9, 3)),
            ValueError,
            ("reference must", "(9, 3)"),
        ),
        (lambda p: p.plot_posteriors(SAMPLES, [0.0]), TypeError, ("reference must", "list")),
        (lambda p: p.plot_posteriors(SAMPLES, axes=3), TypeError, ("axes must", "int")),
        (
            lambda p: p.plot_posteriors(SAMPLES, axes=plt.subplots(1, 3)[1]),
            ValueError,
            ("axes must be 2", "got 3"),
        ),
        (
            lambda p: p.plot_posteriors(SAMPLES, axes=plt.subplots(1, 2)[1], dims=(0,)),
            ValueError,
            ("axes must be None", "1 parameters"),
        ),
        (lambda p: p.plot_posteriors(SAMPLES, dims=1), TypeError, ("dims must", "int (1)")),
        (lambda p: p.plot_posteriors(SAMPLES, dims=(0, 2)), ValueError, ("dims must", "got 2")),
        (lambda p: p.plot_posteriors(SAMPLES, dims=(0, -1)), ValueError, ("dims must", "got -1")),
        (lambda p: p.plot_posteriors(SAMPLES, dims=(0, 0)), ValueError, ("dims must", "(0, 0)")),
        (lambda p: p.plot_posteriors(SAMPLES, dims=()), ValueError, ("dims must", "()")),
        (lambda p: p.plot_posteriors(SAMPLES, dims=("a",)), TypeError, ("dims must", "str")),
        (lambda p: p.plot_posteriors(SAMPLES, labels="ab"), TypeError, ("labels must", "str")),
        (lambda p: p.plot_posteriors(SAMPLES, labels=["a"]), ValueError, ("labels must", "got 1")),
        (lambda p: p.plot_posteriors(SAMPLES, labels=[1, 2]), TypeError, ("labels must", "int")),
    ],
)
def test_figures(call, error, parts):
    plt.close("all")
    before = len(plt.get_fignums())
    refused(lambda: call(diagnostics.plots), error, *parts)
    assert len(plt.get_fignums()) <= before + 1  # at most the test's own: checked before drawn
    plt.close("all")


def test_a_summary_without_a_symmetric_stage_gives_empty_panels():
    axes = diagnostics.plot_training({"validation_loss": [1.0, 0.9], "epochs_trained": [2]})
    assert all("no symmetric stage" in axis.texts[0].get_text() for axis in axes)
    plt.close("all")


def test_good_arguments_are_accepted():
    theta, x = pairs(60)
    assert report(theta, x).num_pairs == 60
    assert len(coverage_curve(RANKS, torch.tensor([0.2, 0.8])).values) == 2
    diagnostics.plot_divergences({"NPE": REPORT, "ours": REPORT})
    diagnostics.plot_posteriors(SAMPLES, dims=(1, 0), labels=("a", "b"))
    plt.close("all")

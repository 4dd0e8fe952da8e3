"""Diagnostics of a posterior: held-out report with its findings, calibration, and figures."""

from sbi_jeffreys.diagnostics.calibration import (
    Coverage,
    CoverageCurve,
    PairDraws,
    coverage_curve,
    expected_coverage,
    held_out_nll,
    hpd_ranks,
    inside_prior,
    leakage,
    marginal_ranks,
)
from sbi_jeffreys.diagnostics.findings import Finding, FindingKind, Measurement, Statistic
from sbi_jeffreys.diagnostics.misspecification import (
    MisspecificationTest,
    misspecification_test,
)
from sbi_jeffreys.diagnostics.plots import (
    plot_c2st_against_budget,
    plot_coverage,
    plot_divergences,
    plot_posteriors,
    plot_training,
)
from sbi_jeffreys.diagnostics.report import HeldOutReport, held_out_report

__all__ = [
    "Coverage",
    "CoverageCurve",
    "Finding",
    "FindingKind",
    "HeldOutReport",
    "Measurement",
    "MisspecificationTest",
    "PairDraws",
    "Statistic",
    "coverage_curve",
    "expected_coverage",
    "held_out_nll",
    "held_out_report",
    "hpd_ranks",
    "inside_prior",
    "leakage",
    "marginal_ranks",
    "misspecification_test",
    "plot_c2st_against_budget",
    "plot_coverage",
    "plot_divergences",
    "plot_posteriors",
    "plot_training",
]

"""Posterior estimation with the symmetric Jeffreys divergence: a drop-in for sbi's NPE."""

from sbi_jeffreys import diagnostics, objective
from sbi_jeffreys.diagnostics import plots
from sbi_jeffreys.diagnostics.report import HeldOutReport, held_out_report
from sbi_jeffreys.npe import NPE_Jeffreys
from sbi_jeffreys.options import JeffreysOptions
from sbi_jeffreys.posteriors.corrected import CorrectedPosterior
from sbi_jeffreys.proxies import (
    EnergyConfig,
    EnergyProxy,
    FlowExpert,
    GivenProxy,
    LikelihoodProxy,
    Proxy,
    RegressionExpert,
)
from sbi_jeffreys.registration import register
from sbi_jeffreys.training import multipliers

__all__ = [
    "CorrectedPosterior",
    "EnergyConfig",
    "EnergyProxy",
    "FlowExpert",
    "GivenProxy",
    "HeldOutReport",
    "JeffreysOptions",
    "LikelihoodProxy",
    "NPE_Jeffreys",
    "Proxy",
    "RegressionExpert",
    "diagnostics",
    "held_out_report",
    "multipliers",
    "objective",
    "plots",
    "register",
]
__version__ = "0.1.0"

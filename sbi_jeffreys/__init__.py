"""Posterior estimation with the symmetric Jeffreys divergence: a drop-in for sbi's NPE."""

from sbi_jeffreys import diagnostics, objective
from sbi_jeffreys._checks import JeffreysWarning
from sbi_jeffreys.diagnostics import plots
from sbi_jeffreys.diagnostics.misspecification import (
    MisspecificationTest,
    misspecification_test,
)
from sbi_jeffreys.diagnostics.report import HeldOutReport, held_out_report
from sbi_jeffreys.networks.builders import MainBuilder
from sbi_jeffreys.npe import NPE_Jeffreys, register
from sbi_jeffreys.options import JeffreysOptions
from sbi_jeffreys.posteriors.corrected import CorrectedPosterior
from sbi_jeffreys.proxies import (
    EnergyConfig,
    EnergyProxy,
    FlowExpert,
    GivenProxy,
    LikelihoodProxy,
    NeuralRegressionExpert,
    Proxy,
    RegressionExpert,
)
from sbi_jeffreys.training import multipliers
from sbi_jeffreys.training.report import TrainingReport

__all__ = [
    "CorrectedPosterior",
    "EnergyConfig",
    "EnergyProxy",
    "FlowExpert",
    "GivenProxy",
    "HeldOutReport",
    "JeffreysOptions",
    "JeffreysWarning",
    "LikelihoodProxy",
    "MainBuilder",
    "MisspecificationTest",
    "NPE_Jeffreys",
    "NeuralRegressionExpert",
    "Proxy",
    "RegressionExpert",
    "TrainingReport",
    "diagnostics",
    "held_out_report",
    "misspecification_test",
    "multipliers",
    "objective",
    "plots",
    "register",
]
__version__ = "0.1.0"

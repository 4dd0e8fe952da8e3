"""Every non-public name of sbi that we use, and nothing else: when sbi moves, this file changes."""

from sbi.inference.posteriors.posterior_parameters import (
    ImportanceSamplingPosteriorParameters,
    MCMCPosteriorParameters,
    PosteriorParameters,
    RejectionPosteriorParameters,
)
from sbi.inference.potentials.base_potential import BasePotential
from sbi.inference.trainers._contracts import LossArgsNPE, StartIndexContext, TrainConfig
from sbi.inference.trainers.base import LossArgs
from sbi.inference.trainers.npe.npe_c import NPE_C
from sbi.neural_nets.estimators.base import (
    ConditionalDensityEstimator,
    ConditionalEstimatorBuilder,
)
from sbi.neural_nets.estimators.mixture_density_estimator import MixtureDensityEstimator
from sbi.neural_nets.factory import model_builders
from sbi.sbi_types import Tracker
from sbi.utils.sbiutils import ImproperEmpirical

__all__ = [
    "NPE_C",
    "BasePotential",
    "ConditionalDensityEstimator",
    "ConditionalEstimatorBuilder",
    "ImportanceSamplingPosteriorParameters",
    "ImproperEmpirical",
    "LossArgs",
    "LossArgsNPE",
    "MCMCPosteriorParameters",
    "MixtureDensityEstimator",
    "PosteriorParameters",
    "RejectionPosteriorParameters",
    "StartIndexContext",
    "Tracker",
    "TrainConfig",
    "model_builders",
]

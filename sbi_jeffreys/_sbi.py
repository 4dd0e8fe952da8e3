"""Every non-public name of sbi that we use, and nothing else: when sbi moves, this file changes."""

import torch
from sbi.inference.posteriors.base_posterior import NeuralPosterior
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
from torch.distributions import Distribution

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
    "device_of",
    "model_builders",
    "network_of",
    "prior_of",
]


def network_of(trainer: NPE_C) -> ConditionalDensityEstimator | None:
    """The trainer's density estimator p_φ(θ|x), or None before training."""
    return trainer._neural_net


def prior_of(owner: NPE_C | NeuralPosterior) -> Distribution:
    """The prior of a trainer or of a posterior."""
    return owner._prior if isinstance(owner, NPE_C) else owner.prior  # type: ignore[return-value]


def device_of(owner: NPE_C | NeuralPosterior) -> torch.device:
    """The device of a trainer or of a posterior."""
    return torch.device(owner._device)

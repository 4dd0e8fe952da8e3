# ruff: noqa: F401 - the rest of the package imports these names from here
"""The only module that uses what is not public in sbi: names, and attributes to read or set.

Later rounds need sbi's losses of a batch; resuming, pickling and reports need attributes of a
trainer or posterior. When sbi changes, this file changes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from copy import copy
from typing import Any

import torch
from sbi import neural_nets
from sbi.inference import NPE
from sbi.inference.posteriors.posterior_parameters import (
    DirectPosteriorParameters,
    ImportanceSamplingPosteriorParameters,
    MCMCPosteriorParameters,
    PosteriorParameters,
    RejectionPosteriorParameters,
)
from sbi.inference.potentials.base_potential import BasePotential
from sbi.inference.trainers._contracts import LossArgsNPE
from sbi.neural_nets.estimators.base import ConditionalDensityEstimator
from sbi.neural_nets.estimators.mixed_density_estimator import MixedDensityEstimator
from sbi.neural_nets.factory import model_builders
from sbi.sbi_types import Tracker
from sbi.utils import RestrictedPrior
from sbi.utils.sbiutils import ImproperEmpirical
from torch import Tensor
from torch.distributions import Distribution

# Base class of the typed configs whose models a trainer fits; None in sbi 0.27, which has none.
DensityConfigBase: type | None = getattr(neural_nets, "DensityConfigBase", None)


class NoTracker:
    """A tracker for sbi that keeps nothing: sbi's own writes a folder for every training."""

    log_dir: str | None = None

    def log_metric(self, *values: Any, **named: Any) -> None:
        """Keep nothing."""

    log_metrics = log_params = add_figure = flush = log_metric


@contextmanager
def silent_unless(shown: bool) -> Iterator[None]:
    """Suppress what sbi prints inside, except where progress is to be shown."""
    with nullcontext() if shown else redirect_stdout(io.StringIO()):
        yield


@contextmanager
def silent_prior() -> Iterator[None]:
    """Suppress what a prior such as sbi's RestrictedPrior prints in `sample` and `log_prob`."""
    with silent_unless(False):
        yield


class RoundsTrainer(NPE):
    """sbi's trainer, which takes no reweighted posterior for the mixture that it reweights."""

    def _multiround_loss_is_per_row(self, proposal: Any | None) -> bool:
        """Whether sbi's closed-form loss of a mixture of Gaussians applies to a proposal."""
        # mutant: reweighted-taken-for-a-mixture
        reweighted = getattr(proposal, "reweighted", False)
        return not reweighted and super()._multiround_loss_is_per_row(proposal)


def network_of(trainer: NPE) -> ConditionalDensityEstimator | None:
    """The trainer's network, None before training."""
    return trainer._neural_net


def set_network(trainer: NPE, network: ConditionalDensityEstimator) -> None:
    """Replace the trainer's network."""
    trainer._neural_net = network


def prior_of(owner: Any) -> Distribution:
    """The prior of a trainer (`ImproperEmpirical` if none was given), posterior or truncation."""
    return owner._prior if isinstance(owner, (NPE, RestrictedPrior)) else owner.prior


def device_of(owner: Any) -> torch.device:
    """The device of a trainer or posterior."""
    return torch.device(owner._device)


def set_device(trainer: NPE, device: str) -> None:
    """Replace the trainer's device."""
    trainer._device = device


def tracker_of(trainer: NPE) -> Tracker:
    """The tracker to which the trainer logs its traces."""
    return trainer._tracker


def set_tracker(trainer: NPE, tracker: Tracker) -> None:
    """Replace the trainer's tracker."""
    trainer._tracker = tracker


def set_builder(trainer: NPE, builder: Any) -> None:
    """Replace the trainer's builder, which sbi drops when a trainer is pickled."""
    trainer._build_neural_net = builder


def latest_round(trainer: NPE) -> int:
    """Index of the latest round of simulations, −1 without any."""
    return max(trainer._data_round_index, default=-1)


def rounds_of_simulations(trainer: NPE, starting_round: int) -> Tensor:
    """Index of the round of every simulation from a round on, `(N,)`, in the order of use."""
    parts = zip(trainer._theta_roundwise, trainer._data_round_index)
    return torch.cat([torch.full((len(t),), r) for t, r in parts if r >= starting_round])


@contextmanager
def all_or_nothing(trainer: NPE) -> Iterator[None]:
    """Drop the simulations that were appended inside if sbi refuses them afterwards."""
    lists = (
        trainer._theta_roundwise,
        trainer._x_roundwise,
        trainer._prior_masks,
        trainer._proposal_roundwise,
        trainer._data_round_index,
    )
    sizes = [len(values) for values in lists]
    try:
        yield
    except BaseException:
        for values, size in zip(lists, sizes):
            del values[size:]  # mutant: refused-simulations-kept
        raise


def on_prior(restricted: RestrictedPrior, prior: Distribution) -> RestrictedPrior:
    """A copy of a truncation whose prior is this object."""
    twin = copy(restricted)
    twin._prior = prior
    return twin


def truncated_rounds(trainer: NPE) -> list[tuple[RestrictedPrior | None, Tensor]] | None:
    """The truncated prior, None for the prior itself, and θ of each time simulations were appended.

    None if no proposal is a truncation of the trainer's prior, or if others are among them.
    """
    if latest_round(trainer) != 0:  # sbi counts truncations of the prior as further first rounds
        return None
    found = [
        (proposal if isinstance(proposal, RestrictedPrior) else None, theta.to(trainer._device))
        for proposal, theta in zip(trainer._proposal_roundwise, trainer._theta_roundwise)
    ]
    return found if any(proposal is not None for proposal, _ in found) else None


def restore_best_weights(trainer: NPE) -> None:
    """Put the best weights of plain NPE so far into the network, in evaluation mode."""
    main, best = trainer._neural_net, trainer._best_model_state_dict
    if main is not None and best is not None and best.keys() == main.state_dict().keys():
        main.load_state_dict(best)
        main.zero_grad(set_to_none=True)
        main.eval()


def describe_round(trainer: NPE) -> str:
    """sbi's description of the latest round: epochs and best validation loss."""
    return trainer._describe_round(latest_round(trainer), trainer.summary)


def losses(
    trainer: NPE,
    batch: Sequence[Tensor],
    kernel: Callable[[Tensor], Tensor],
    force_first_round_loss: bool,
) -> Tensor:
    """sbi's losses `(B,)` of a batch (θ, x and prior masks), corrected for the latest proposal."""
    arguments = LossArgsNPE(
        proposal=trainer._proposal_roundwise[-1],
        calibration_kernel=kernel,
        force_first_round_loss=force_first_round_loss,
    )
    return trainer._get_losses(batch, arguments)


# ------------------------------------------------------------------ nflows and torch


def parts_of_flow(flow: Any) -> tuple[list[Any], Any, Any] | None:
    """Transforms, base distribution and embedding net of an estimator of nflows; None of others."""
    net: Any = getattr(flow, "net", None)
    if not hasattr(net, "_transform") or not hasattr(net._transform, "_transforms"):
        return None
    return list(net._transform._transforms), net._distribution, net._embedding_net


def scale_and_shift(transform: Any) -> tuple[Tensor, Tensor]:
    """Those of one of nflows' `PointwiseAffineTransform`s."""
    return transform._scale, transform._shift


def permutation_of(transform: Any) -> Tensor:
    """The order of the outputs of one of nflows' permutations."""
    return transform._permutation


def mean_and_std(standardised: Any) -> tuple[Tensor, Tensor] | None:
    """Those of sbi's `Standardize`; None of any other module."""
    if not hasattr(standardised, "_mean") or not hasattr(standardised, "_std"):
        return None
    return standardised._mean, standardised._std


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    return tensor._version

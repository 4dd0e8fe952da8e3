"""Plain NPE that `max_num_epochs` stopped before it converged, kept for a later call to go on."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from sbi_jeffreys import _sbi
from sbi_jeffreys._checks import warn
from sbi_jeffreys._sbi import NPE, ConditionalDensityEstimator
from sbi_jeffreys.training.arguments import TrainArguments
from sbi_jeffreys.training.report import StageStatus
from sbi_jeffreys.training.symmetric import SymmetricTraining

__all__ = ["UnfinishedPlain", "goes_on"]


@dataclass
class UnfinishedPlain:
    """A plain NPE and its optimiser, from before the symmetric stage changed the network.

    Attributes:
        network: Plain NPE.
        optimizer: sbi's optimiser of the parameters of this network.
        random_state: State of the training's random stream.
    """

    network: ConditionalDensityEstimator
    optimizer: Optimizer
    random_state: Tensor

    @classmethod
    def of(cls, trainer: NPE, max_num_epochs: int) -> UnfinishedPlain | None:
        """A copy of what sbi's `train` has just left; None if training had converged."""
        if trainer.epoch <= max_num_epochs:
            return None
        # Together, so that the copied optimiser has the parameters of the copied network.
        network, optimizer = deepcopy((_sbi.network_of(trainer), trainer.optimizer))
        assert network is not None
        return cls(network, optimizer, torch.get_rng_state())  # type: ignore[arg-type]

    def put_back(self, trainer: NPE) -> None:
        """Give the trainer this network and optimiser, whose training sbi then resumes."""
        _sbi.set_network(trainer, self.network)
        trainer.optimizer = self.optimizer  # type: ignore[assignment]


def goes_on(
    trainer: NPE,
    unfinished: UnfinishedPlain | None,
    symmetric: SymmetricTraining | None,
    arguments: TrainArguments,
) -> UnfinishedPlain | None:
    """The plain NPE that a resumed training continues, put back into the trainer; or None.

    It is continued where `max_num_epochs` stopped it in an earlier call and is larger now, and the
    symmetric stage that began from it is over.

    Warns:
        JeffreysWarning: If that stage is not over: it goes on first.
    """
    if unfinished is None or symmetric is None or not arguments.resume_training:
        return None
    if symmetric.status is StageStatus.PAUSED:
        warn(
            "Plain NPE was stopped by max_num_epochs before it had converged, and the symmetric "
            "stage, which began from there, goes on first. After it, train(resume_training=True) "
            "with a larger max_num_epochs continues plain NPE and begins the stage anew.",
        )
        return None
    if trainer.epoch > arguments.max_num_epochs:
        return None
    unfinished.put_back(trainer)  # mutant: plain-npe-not-continued
    return unfinished

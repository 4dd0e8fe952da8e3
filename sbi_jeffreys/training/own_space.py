"""A second plain NPE, with θ in its own space, for trainings in which plain NPE is the result.

In the prior's unconstrained space, where our builder models θ, the prior's edge is at infinity. A
posterior that piles up there is hard to fit from a few simulations. The symmetric stage makes up
for this difficulty. Where plain NPE is kept, nothing does, and sbi's own NPE, which models θ as it
is and is cut off at the prior by rejection, can be some tenths of a nat better.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.distributions import Distribution
from torch.utils.data import DataLoader

from sbi_jeffreys import _sbi
from sbi_jeffreys._checks import warn
from sbi_jeffreys._sbi import NPE, ConditionalDensityEstimator, NoTracker
from sbi_jeffreys.diagnostics.calibration import CoverageCurve
from sbi_jeffreys.networks.builders import MainBuilder, UnconstrainedDensityEstimator
from sbi_jeffreys.training.arguments import TrainArguments
from sbi_jeffreys.training.data import held_out_pairs
from sbi_jeffreys.training.held_out import HeldOut
from sbi_jeffreys.training.report import Estimate, Space, SpaceChoice

__all__ = ["KeptPlain", "choose_space"]

# Standard errors of the paired difference by which θ's own space must be better. In a tie the main
# is kept, because no mass leaks from it and later rounds continue with it. With no margin, a second
# network that is just as good would replace it by chance half of the time, with a margin of one, a
# sixth of the time. Two would refuse most true gains, which are as large as the standard error of
# thirty held-out pairs.
_MARGIN = 1.0


@dataclass(frozen=True)
class KeptPlain:
    """The plain NPE that is kept, and why.

    Attributes:
        network: The better of the two networks, in evaluation mode.
        losses: Its held-out losses, `(M,)`.
        coverage: Coverage of its regions on held-out pairs; None if it is the main as it was.
        choice: The comparison of the two networks.
    """

    network: ConditionalDensityEstimator
    losses: Tensor
    coverage: CoverageCurve | None
    choice: SpaceChoice


class _SameSplit(NPE):
    """sbi's NPE with the split of another trainer."""

    def __init__(self, other: NPE, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # mutant: another-split
        self.train_indices, self.val_indices = other.train_indices, other.val_indices

    def get_dataloaders(
        self,
        starting_round: int = 0,
        training_batch_size: int = 200,
        validation_fraction: float = 0.1,
        resume_training: bool = False,
        dataloader_kwargs: dict[str, Any] | None = None,
    ) -> tuple[DataLoader, DataLoader]:
        """sbi's loaders of the other trainer's split."""
        return super().get_dataloaders(
            starting_round, training_batch_size, validation_fraction, True, dataloader_kwargs
        )


def choose_space(
    trainer: NPE, builder: Any, arguments: TrainArguments, show_progress_bars: bool
) -> KeptPlain | None:
    """Train plain NPE with θ in its own space, and choose between it and the trainer's main.

    This is done in the first round only: in later rounds, more and more mass of a main in θ's own
    space leaks out of the prior.

    Args:
        trainer: The trainer; it stays as it is.
        builder: Builder of the main.
        arguments: Arguments of `train`.
        show_progress_bars: Whether to show progress.

    Returns:
        The better of the two. None without a second network: in later rounds, if the main is not
        modelled in the prior's unconstrained space by a `MainBuilder`, if the second training
        failed or its loss was not finite, or if the kernel excludes every held-out pair.

    Warns:
        JeffreysWarning: If the second training failed, for instance for want of memory. The first
            network is trained already, and must not be lost to an error of an optional second one.
    """
    main, prior = _sbi.network_of(trainer), _sbi.prior_of(trainer)
    # mutant: own-space-of-later-rounds
    first_round = _sbi.latest_round(trainer) == 0
    ours = isinstance(builder, MainBuilder)
    if not (first_round and ours and isinstance(main, UnconstrainedDensityEstimator)):
        return None
    held_out = held_out_pairs(trainer, 0, arguments)
    if held_out.excluded:  # mutant: judged-by-excluded-pairs
        return None
    main_losses = held_out.main_losses(main)
    try:
        own = _train_own(trainer, builder, arguments, show_progress_bars)
        return _better(main, main_losses, own, held_out, prior)
    except (ValueError, AssertionError):  # raised by sbi for values that are not finite
        return None
    except RuntimeError as error:  # mutant: second-npe-must-not-fail
        warn(
            "The second plain NPE, with theta in its own space, could not be trained or evaluated "
            f"({error}): the first one was kept. If memory was too little, free some and train "
            "anew to have the better of the two.",
        )
        return None


def _better(
    main: ConditionalDensityEstimator,
    main_losses: Tensor,
    own: ConditionalDensityEstimator,
    held_out: HeldOut,
    prior: Distribution,
) -> KeptPlain:
    """The better of the main, whose held-out losses are given, and the second network."""
    losses = {Space.PRIOR: main_losses, Space.OWN: held_out.truncated_losses(own, prior)}
    gain = Estimate.of(losses[Space.PRIOR] - losses[Space.OWN], held_out.weights)
    # mutant: own-space-always, own-space-never, own-space-without-margin
    kept = Space.OWN if gain.value > _MARGIN * gain.error else Space.PRIOR
    values = {space: Estimate.of(each, held_out.weights) for space, each in losses.items()}
    choice = SpaceChoice(kept, values[Space.PRIOR], values[Space.OWN], gain)
    if kept is Space.PRIOR:
        return KeptPlain(main, losses[kept], None, choice)
    return KeptPlain(own, losses[kept], held_out.coverage(own, prior), choice)


def _train_own(
    trainer: NPE, builder: MainBuilder, arguments: TrainArguments, show_progress_bars: bool
) -> ConditionalDensityEstimator:
    """Plain NPE with θ in its own space, from the start, on the trainer's split."""
    theta, x, _ = trainer.get_simulations(0)
    own = _SameSplit(
        trainer,
        # The loss of a first round needs no prior, and some priors print or cannot be copied.
        density_estimator=builder.with_prior(None),
        device=str(_sbi.device_of(trainer)),
        tracker=NoTracker(),
        show_progress_bars=show_progress_bars,
    )
    anew = replace(arguments, resume_training=False, show_train_summary=False)
    with _sbi.silent_unless(show_progress_bars), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first training has warned of the same
        own.append_simulations(theta, x, exclude_invalid_x=False, data_device=str(theta.device))
        network = own.train(**anew.for_sbi())
    return network.eval()

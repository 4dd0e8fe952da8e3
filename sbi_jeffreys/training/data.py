"""What a training takes from its trainer: simulations, held-out pairs, batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sbi_jeffreys import _sbi
from sbi_jeffreys._sbi import NPE, RestrictedPrior
from sbi_jeffreys.training.arguments import TrainArguments
from sbi_jeffreys.training.held_out import HeldOut
from sbi_jeffreys.training.loss import RealBatch

__all__ = [
    "Position",
    "Simulations",
    "first_of_latest",
    "held_out_pairs",
    "is_atomic",
    "latest",
    "latest_held_out",
    "real_batches",
    "simulations_for_proxy",
    "simulations_in_use",
    "training_loader",
]

_DECIDING_PAIRS = 20  # least number of held-out pairs that decide in later rounds


def simulations_in_use(trainer: NPE, starting_round: int) -> tuple[Tensor, Tensor]:
    """θ `(N, D)` and x `(N, *x_shape)` from `starting_round` on, on the training device."""
    theta, x, _ = trainer.get_simulations(starting_round)
    device = _sbi.device_of(trainer)
    return theta.to(device), x.to(device)


@dataclass(frozen=True)
class Simulations:
    """All simulations of the rounds in use, on the training device, and how they are split.

    Attributes:
        theta: Parameters `(N, D)`.
        x: Simulations `(N, *x_shape)`.
        train: Indices of training pairs.
        val: Indices of held-out pairs.
        round_: Index of the latest round.
        round_of: Index of each simulation's round, `(N,)`.
        rounds: The truncated prior and θ of each round, where there are truncated proposals.
        earlier: How many of the first simulations belong to rounds that only the proxy is fitted
            to: a likelihood needs no correction for proposals, and without these simulations it
            would have to extrapolate.
    """

    theta: Tensor
    x: Tensor
    train: Tensor
    val: Tensor
    round_: int
    round_of: Tensor
    earlier: int = 0
    rounds: Sequence[tuple[RestrictedPrior | None, Tensor]] | None = None

    @property
    def deciding(self) -> Tensor:
        """Indices of the training pairs of those rounds whose held-out pairs decide, `(M,)`."""
        first = first_of_latest(self.round_of[self.val], _DECIDING_PAIRS)
        return self.train[self.round_of[self.train] >= first]  # mutant: pool-of-all-rounds

    @property
    def theta_by_rounds(self) -> list[Tensor]:
        """θ of each round, `(N, D)` each."""
        return [self.theta[self.round_of == index] for index in self.round_of.unique()]

    @property
    def in_use(self) -> int:
        """How many simulations plain NPE has, to train on and held out."""
        return len(self.theta) - self.earlier

    def for_fit(self) -> tuple[Tensor, Tensor]:
        """Indices of the pairs that the proxy is fitted to, and of those that judge the fit."""
        share = len(self.val) / (len(self.train) + len(self.val))
        earlier = torch.arange(self.earlier, device=self.train.device)
        # mutant: proxy-of-the-latest-rounds-alone
        fitted, judging = earlier.tensor_split([self.earlier - int(share * self.earlier)])
        return torch.cat([fitted, self.train]), torch.cat([judging, self.val])


def simulations_for_proxy(trainer: NPE, starting_round: int) -> Simulations:
    """All simulations, with the split of those from `starting_round` on."""
    theta, x = simulations_in_use(trainer, 0)
    round_of = _sbi.rounds_of_simulations(trainer, 0).to(theta.device)
    earlier = int((round_of < starting_round).sum())
    train, val = (
        rows.to(theta.device) + earlier for rows in (trainer.train_indices, trainer.val_indices)
    )
    rounds = _sbi.truncated_rounds(trainer)
    latest_round = _sbi.latest_round(trainer)
    return Simulations(theta, x, train, val, latest_round, round_of, earlier, rounds)


def held_out_pairs(trainer: NPE, starting_round: int, arguments: TrainArguments) -> HeldOut:
    """Pairs that plain NPE was validated on; with the atomic loss, those of the latest rounds.

    Proposals of later rounds approach the posterior at the observation that the rounds are for, and
    the pairs of the first rounds are far from it: how well a density fits them says little.
    """
    theta, x = simulations_in_use(trainer, starting_round)
    pairs = _deciding_pairs(trainer, starting_round, arguments)
    weights = _kernel(trainer, starting_round, arguments)(x[pairs])
    return HeldOut(theta[pairs], x[pairs], weights, is_atomic(trainer, arguments))


def is_atomic(trainer: NPE, arguments: TrainArguments) -> bool:
    """Whether the loss of the simulations in use is that of later rounds."""
    return _sbi.latest_round(trainer) > 0 and not arguments.force_first_round_loss


def _deciding_pairs(trainer: NPE, starting_round: int, arguments: TrainArguments) -> Tensor:
    """Indices of the pairs of `held_out_pairs`, `(M,)`."""
    if not is_atomic(trainer, arguments):
        return trainer.val_indices
    return latest_held_out(trainer, starting_round)  # mutant: first-rounds-decide


def latest_held_out(trainer: NPE, starting_round: int) -> Tensor:
    """Indices of the held-out pairs of the latest rounds, `(M,)`; of all in a first round."""
    val = trainer.val_indices
    rounds = _sbi.rounds_of_simulations(trainer, starting_round).to(val.device)
    return val[latest(rounds[val], _DECIDING_PAIRS)]


def first_of_latest(rounds: Tensor, num: int) -> Tensor:
    """Index of the first of the rounds to which the pairs of `latest` belong, shape `()`."""
    return rounds.sort(descending=True).values[:num].min()


def latest(rounds: Tensor, num: int) -> Tensor:
    """Which pairs belong to the latest rounds, as few rounds as have `num` pairs together, `(M,)`.

    Args:
        rounds: Index of each pair's round, `(M,)`.
        num: Least number of pairs; where there are fewer in all, every pair belongs.
    """
    return rounds >= first_of_latest(rounds, num)


def _kernel(
    trainer: NPE, starting_round: int, arguments: TrainArguments
) -> Callable[[Tensor], Tensor]:
    """The calibration kernel, divided by its mean over the held-out pairs, if that is not zero.

    The scale of a kernel has no meaning, but held-out values in nats per pair do: they decide the
    trust. F is compared with these values, so the weights in F are divided by the same number.
    """
    if arguments.calibration_kernel is None:
        return arguments.kernel
    _, x = simulations_in_use(trainer, starting_round)
    pairs = _deciding_pairs(trainer, starting_round, arguments)
    scale = arguments.kernel(x[pairs]).double().mean()
    scale = torch.where(scale > 0, scale, 1.0)  # mutant: kernels-scale-decides

    def kernel(x: Tensor) -> Tensor:
        return (arguments.kernel(x).double() / scale).float()

    return kernel


def training_loader(trainer: NPE, starting_round: int, arguments: TrainArguments) -> DataLoader:
    """sbi's loader of the training simulations that plain NPE was trained on."""
    return trainer.get_dataloaders(
        starting_round,
        arguments.training_batch_size,
        arguments.validation_fraction,
        resume_training=True,
        dataloader_kwargs=arguments.dataloader_kwargs,
    )[0]


@dataclass
class Position:
    """Where in an epoch of the loader a training is, so that resuming it takes the next batch.

    Attributes:
        start: Torch's random state before the epoch was shuffled; None before the first epoch.
        taken: Batches of that epoch that were taken.
    """

    start: Tensor | None = None
    taken: int = 0

    def batches(self, loader: DataLoader) -> Iterator[Any]:
        """The batches from here on, epoch after epoch, without an end."""
        epoch = self._rest(loader)
        while True:
            for batch in epoch:
                self.taken += 1
                yield batch
            self.start, self.taken = torch.get_rng_state(), 0
            epoch = iter(loader)

    def _rest(self, loader: DataLoader) -> Iterator[Any]:
        """What is left of the epoch, shuffled as before; the random state stays as it is."""
        if self.start is None:
            return iter(())
        with torch.random.fork_rng(devices=[]), suppress(StopIteration):
            torch.set_rng_state(self.start.cpu())
            batches = iter(loader)
            for _ in range(self.taken):  # mutant: resumed-with-another-batch
                next(batches)
        return batches


def real_batches(
    trainer: NPE,
    starting_round: int,
    arguments: TrainArguments,
    atomic: bool,
    position: Position,
) -> Callable[[], RealBatch]:
    """A function that returns the next training batch; in later rounds, sbi's losses of it.

    Batches go on from `position`, which is kept up to date, epoch after epoch.
    """
    loader = training_loader(trainer, starting_round, arguments)
    kernel = _kernel(trainer, starting_round, arguments)  # mutant: forward-term-by-another-scale
    device = _sbi.device_of(trainer)

    stream = position.batches(loader)

    def pairs() -> RealBatch:
        theta, x = (t.to(device) for t in next(stream)[:2])
        return theta, x, kernel(x)

    def atomic_losses() -> RealBatch:
        force = arguments.force_first_round_loss
        return _sbi.losses(trainer, next(stream), kernel, force)

    return atomic_losses if atomic else pairs

"""Fits of small networks on few data: one loop for every proxy.

sbi's trainers choose their own data split and optimiser. A proxy needs the *main's* split, because
the proxy's held-out loss decides how far it is trusted. On few simulations, two things that sbi's
loop does not have improve the fit: an exponential moving average of the weights, which also allows
larger steps, and decoupled weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.clip_grad import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sbi_jeffreys._checks import check_float, check_int
from sbi_jeffreys.networks.flat import flattened

__all__ = [
    "RACE_EPOCHS",
    "FitConfig",
    "FitResult",
    "can_fuse",
    "cosine_factor",
    "ema_decay",
    "fit_network",
]

# A fit is abandoned after so many epochs if its loss exceeds that of an earlier fit by more than so
# many nats, and by more than this share of what the earlier fit gained after these epochs.
RACE_EPOCHS = 20
_RACE_MARGIN, _RACE_SHARE = 0.4, 0.5

_LEAST_PATIENCE = 10  # epochs

Loss = Callable[[nn.Module, Tensor, bool], Tensor]
_Weights = list[nn.Parameter]


@dataclass(frozen=True)
class FitConfig:
    """How a proxy's network is fitted.

    Attributes:
        learning_rate: AdamW's step size.
        weight_decay: Decoupled decay (Loshchilov & Hutter 2019); the weights shrink by
            `learning_rate · weight_decay` per step.
        batch_size: Pairs per step; None: a ninth of the training pairs, between 20 and 200, so that
            an epoch has about nine steps where simulations are few.
        patience: Epochs without held-out improvement before stopping.
        patience_steps: Stop sooner, after this many steps and at least ten epochs without
            improvement; None: not sooner.
        max_epochs: Upper bound on epochs, over which the learning rate decays along a cosine.
        ema_decay: Decay of the weights' moving average per step, in [0, 1); warms up from 0.1.
        clip_max_norm: Gradient norm bound, or None.

    Raises:
        TypeError, ValueError: Naming the field, what was expected and what came.
    """

    learning_rate: float = 4e-3
    weight_decay: float = 0.0
    batch_size: int | None = None
    patience: int = 20
    patience_steps: int | None = 90
    max_epochs: int = 150
    ema_decay: float = 0.995
    clip_max_norm: float | None = 5.0

    def __post_init__(self) -> None:
        check_float("learning_rate", self.learning_rate, 0.0, low_open=True)
        check_float("weight_decay", self.weight_decay, 0.0)
        check_float("ema_decay", self.ema_decay, 0.0, 1.0, high_open=True)
        check_int("patience", self.patience, 1)
        check_int("max_epochs", self.max_epochs, 1)
        for name in ("batch_size", "patience_steps"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        if self.clip_max_norm is not None:
            check_float("clip_max_norm", self.clip_max_norm, 0.0, low_open=True)

    def at_most(self, max_epochs: int | None, patience: int | None) -> FitConfig:
        """This config with `max_epochs` and `patience` reduced to these numbers, if not None."""
        return replace(
            self,
            max_epochs=min(self.max_epochs, max_epochs or self.max_epochs),
            patience=min(self.patience, patience or self.patience),
        )

    def batch_size_for(self, num_pairs: int) -> int:
        """Pairs per step, for `num_pairs` training pairs."""
        return min(num_pairs, self.batch_size or max(20, min(200, num_pairs // 9)))

    def epochs_without_gain(self, steps_per_epoch: int) -> int:
        """Epochs without held-out improvement before stopping.

        Example:
            >>> FitConfig().epochs_without_gain(9), FitConfig().epochs_without_gain(4)
            (10, 20)
        """
        if self.patience_steps is None:
            return self.patience
        enough = max(_LEAST_PATIENCE, math.ceil(self.patience_steps / max(1, steps_per_epoch)))
        return min(self.patience, enough)


@dataclass(frozen=True)
class FitResult:
    """Held-out loss of the weights kept (nats; inf if none was finite), and epochs run.

    `early` is the best held-out loss after twenty epochs, which later fits are compared with.
    """

    held_out: float
    epochs: int
    early: float = math.inf

    @property
    def abandon_threshold(self) -> float:
        """The loss after twenty epochs above which a later fit is abandoned; inf if unknown."""
        gained = self.early - self.held_out if math.isfinite(self.early) else 0.0
        return self.early + max(_RACE_MARGIN, _RACE_SHARE * gained)  # mutant: slow-fits-given-up


def can_fuse(net: nn.Module) -> bool:
    """Whether Adam's fused kernel takes the parameters: not the complex ones of spectral nets."""
    return all(p.is_floating_point() for p in net.parameters())


def _step(weights: _Weights, loss: Tensor, optimizer: AdamW, clip: float | None) -> None:
    """One gradient step, which is skipped if the loss or the gradient is not finite."""
    if not bool(torch.isfinite(loss)):
        return
    optimizer.zero_grad(set_to_none=False)  # in place: gradients may be views, see `flattened`
    loss.backward()
    norm = clip_grad_norm_(weights, math.inf if clip is None else clip)
    if bool(torch.isfinite(norm)):
        optimizer.step()


def cosine_factor(epoch: int, max_epochs: int) -> float:
    """Learning-rate factor that decays from 1 to a hundredth along a cosine."""
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * epoch / max_epochs))


def ema_decay(decay: float, step: int) -> float:
    """d of ema ← d·ema + (1 − d)·net; warms up, so that the initial weights are soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def _average(ema: _Weights, weights: _Weights, decay: float, step: int) -> None:
    average = get_ema_multi_avg_fn(ema_decay(decay, step))
    average(tuple(ema), tuple(weights), step)


def fit_network(
    net: nn.Module,
    loss: Loss,
    train_indices: Tensor,
    val_indices: Tensor,
    config: FitConfig,
    on_epoch: Callable[[int, float], object] | None = None,
    abandon_above: float = math.inf,
) -> FitResult:
    """Fit `net` in place and leave it with the averaged weights that were best on held-out data.

    Args:
        net: The network.
        loss: `loss(net, indices, training)` returns the losses of B pairs, shape `(B,)`.
        train_indices: Pairs to train on, shape `(N,)`.
        val_indices: Held-out pairs, shape `(M,)`.
        config: Optimiser and stopping.
        on_epoch: Called with the epoch and its held-out loss, for progress bars.
        abandon_above: A fit whose held-out loss after twenty epochs is larger is abandoned; the
            `abandon_threshold` of an earlier fit.
    """
    ema, best, early = deepcopy(net), math.inf, math.inf
    epoch = since = step = 0
    batch_size = config.batch_size_for(len(train_indices))
    patience = config.epochs_without_gain(len(train_indices) // batch_size)
    with flattened(net) as weights, flattened(ema) as averages:
        kept = [p.detach().clone() for p in averages]
        optimizer = AdamW(
            weights, lr=config.learning_rate, weight_decay=config.weight_decay, fused=can_fuse(net)
        )
        try:
            while epoch < config.max_epochs and since < patience:
                net.train()
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * cosine_factor(epoch, config.max_epochs)
                order = train_indices[torch.randperm(len(train_indices))]
                for batch in order[: len(order) - len(order) % batch_size].split(batch_size):
                    _step(weights, loss(net, batch, True).mean(), optimizer, config.clip_max_norm)
                    step += 1
                    _average(averages, weights, config.ema_decay, step)
                ema.eval()
                with torch.no_grad():
                    value = float(loss(ema, val_indices, False).mean())
                epoch += 1
                if value < best:  # False for NaN: a failed epoch never becomes the best one.
                    best, since = value, 0
                    kept = [p.detach().clone() for p in averages]
                else:
                    since += 1
                if on_epoch is not None:
                    on_epoch(epoch, value)
                if epoch == RACE_EPOCHS:
                    early = best
                    if best > abandon_above:  # mutant: race-off
                        break
        finally:
            for average, value in zip(averages, kept):
                average.detach().copy_(value)
            net.load_state_dict(ema.state_dict())
            net.eval()
    return FitResult(best, epoch, early)

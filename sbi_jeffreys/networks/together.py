"""Fits of several networks of one architecture in one pass.

On few pairs, most of the time of a gradient step is overhead, the same for one network as for ten.
`torch.func.vmap` evaluates K networks by one call, on batches of their own, and the rows of one
matrix hold their weights: K fits cost two to six times less than one after the other.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim import Adam

from sbi_jeffreys.networks.fitting import (
    RACE_EPOCHS,
    FitConfig,
    FitResult,
    cosine_factor,
    ema_decay,
    fit_network,
)

__all__ = ["FitTask", "fit_together"]


@dataclass(frozen=True)
class FitTask:
    """One network and what it is fitted to.

    Attributes:
        net: The network, fitted in place.
        batch: `batch(indices, training)` returns the tensors `(B, …)` of B pairs that `loss` takes;
            whatever needs no gradient belongs here.
        loss: `loss(net, *batch)` returns the losses of the pairs, shape `(B,)`.
        train: Indices of training pairs, `(N,)`.
        val: Indices of held-out pairs, `(M,)`.
        config: Optimiser and stopping.
        constant: Added to held-out losses, so that those of several fits are comparable.
        abandon_above: See `fit_network`.
    """

    net: nn.Module
    batch: Callable[[Tensor, bool], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]
    train: Tensor
    val: Tensor
    config: FitConfig
    constant: float = 0.0
    abandon_above: float = math.inf

    def fit(self, on_epoch: Callable[[int, float], object] | None = None) -> FitResult:
        """Fit this network alone."""

        def loss(net: nn.Module, indices: Tensor, training: bool) -> Tensor:
            losses = self.loss(net, *self.batch(indices, training))
            return losses if training else losses + self.constant

        return fit_network(
            self.net, loss, self.train, self.val, self.config, on_epoch, self.abandon_above
        )


def fit_together(
    tasks: Sequence[FitTask], on_epoch: Callable[[int, float], object] | None = None
) -> list[FitResult]:
    """Fit the networks, which have one architecture, by one `loss`; see `fit_network`.

    Their configs may differ in the weight decay alone. Where numbers of training pairs differ, the
    smallest decides about the batches.

    Args:
        tasks: What to fit; the networks are left with their best averaged weights.
        on_epoch: Called with the epoch and the mean held-out loss of the networks still fitted.

    Returns:
        A result for each task.
    """
    if len(tasks) == 1:
        return [tasks[0].fit(on_epoch)]
    fits = _Fits(tasks)
    with warnings.catch_warnings():
        # torch asks users to report functions that vmap evaluates for one network after the other.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        try:
            while fits.active:
                values = fits.run_epoch()
                if on_epoch is not None:
                    on_epoch(fits.epoch, float(values.mean()))
                fits.finish(values)
        finally:
            fits.finish_all()
    return [result for result in fits.results if result is not None]


class _Loss(nn.Module):
    """A loss as a module, which `functional_call` can call with other weights."""

    def __init__(self, net: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, *batch: Tensor) -> Tensor:
        return self.loss(self.net, *batch)


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    """What is not trained: buffers and frozen parameters, by name."""
    frozen = {n: p.detach() for n, p in net.named_parameters() if not p.requires_grad}
    return frozen | dict(net.named_buffers())


class _Fits:
    """K fits at once.

    Args:
        tasks: What to fit.
    """

    def __init__(self, tasks: Sequence[FitTask]) -> None:
        self.tasks, self.config = tasks, tasks[0].config
        self.active = list(range(len(tasks)))
        self.results: list[FitResult | None] = [None] * len(tasks)
        self.epoch = self.step = 0
        least = min(len(task.train) for task in tasks)
        self.batch_size = self.config.batch_size_for(least)
        self.num_steps = least // self.batch_size
        self.patience = self.config.epochs_without_gain(self.num_steps)
        self.module = _Loss(deepcopy(tasks[0].net), tasks[0].loss)
        trained = {n: p for n, p in self.module.net.named_parameters() if p.requires_grad}
        self.shapes = {name: p.shape for name, p in trained.items()}
        self.decay = torch.tensor([[task.config.weight_decay] for task in tasks])
        weights = torch.stack([_flat(task.net) for task in tasks])
        self.decay = self.decay.to(weights)
        fixed = [_tensors(task.net) for task in tasks]
        stacked = {name: torch.stack([own[name] for own in fixed]) for name in fixed[0]}
        # Tensors that are equal in all are not stacked: a network may branch on their values.
        self.fixed = {n: t for n, t in stacked.items() if not bool((t == t[:1]).all())}
        self.average = weights.clone()
        self.kept = weights.clone()
        self.best = torch.full((len(tasks),), math.inf)
        self.early, self.since = self.best.clone(), torch.zeros(len(tasks), dtype=torch.long)
        self._use(weights)

    def _use(self, weights: Tensor, moments: dict[str, Tensor] | None = None) -> None:
        """Make these `(K, P)` the weights that the optimiser trains."""
        self.weights = nn.Parameter(weights)
        self.optimizer = Adam([self.weights], lr=self.config.learning_rate, fused=True)
        if moments is not None:
            self.optimizer.state[self.weights] = moments
        self.views = self._views(self.weights.detach())
        for view in self.views.values():
            view.requires_grad_()
        self.averages = self._views(self.average)

    def _views(self, matrix: Tensor) -> dict[str, Tensor]:
        """The rows of a matrix `(K, P)` as parameters `(K, *shape)` by name."""
        parts = matrix.split([shape.numel() for shape in self.shapes.values()], dim=1)
        named = zip(self.shapes.items(), parts)
        return {name: part.view(len(matrix), *shape) for (name, shape), part in named}

    def _losses(self, parameters: dict[str, Tensor], batch: list[Tensor]) -> Tensor:
        """Losses `(K, B)` of batches `(K, B, …)`."""

        def losses(weights: dict[str, Tensor], *parts: Tensor) -> Tensor:
            return functional_call(self.module, weights, parts)

        given = {f"net.{name}": tensor for name, tensor in (parameters | self.fixed).items()}
        if len(self.active) == 1:  # cheaper without vmap
            own = {name: tensor[0] for name, tensor in given.items()}
            return losses(own, *(part[0] for part in batch)).unsqueeze(0)
        return vmap(losses, randomness="different")(given, *batch)

    def _batches(self, indices: Sequence[Tensor], training: bool) -> list[Tensor]:
        """The batch of every network, stacked."""
        own = [self.tasks[k].batch(rows, training) for k, rows in zip(self.active, indices)]
        return [torch.stack(parts) for parts in zip(*own)]

    def run_epoch(self) -> Tensor:
        """One epoch of all; returns the held-out losses of the averaged weights, `(K,)`."""
        self.module.train()
        size = self.batch_size
        rate = self.config.learning_rate * cosine_factor(self.epoch, self.config.max_epochs)
        trains = [self.tasks[k].train for k in self.active]
        orders = [train[torch.randperm(len(train))] for train in trains]
        for i in range(self.num_steps):
            batch = self._batches([order[i * size : (i + 1) * size] for order in orders], True)
            self._take_step(batch, rate)
            self.step += 1
            decay = ema_decay(self.config.ema_decay, self.step)
            self.average.lerp_(self.weights.detach(), 1 - decay)
        self.epoch += 1
        return self._evaluate()

    def _take_step(self, batch: list[Tensor], rate: float) -> None:
        """One step; a gradient that is not finite, or that of such a loss, counts as zero."""
        weights = self.weights.detach()
        losses = self._losses(self.views, batch).mean(dim=1)
        grads = torch.autograd.grad(losses.sum(), list(self.views.values()), materialize_grads=True)
        grad = torch.cat([part.reshape(len(weights), -1) for part in grads], dim=1)
        norms = torch.linalg.vector_norm(grad, dim=1)
        bad = ~torch.isfinite(norms + losses.detach())
        if self.config.clip_max_norm is not None:
            grad.mul_((self.config.clip_max_norm / (norms + 1e-6)).clamp_max(1.0).unsqueeze(1))
        grad[bad] = 0.0  # mutant: one-failure-spoils-all
        self.weights.grad = grad
        weights.mul_(1 - rate * self.decay[self.active])
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    @torch.no_grad()
    def _evaluate(self) -> Tensor:
        """Held-out losses of the averaged weights, `(K,)`."""
        self.module.eval()
        vals = [self.tasks[k].val for k in self.active]
        most = max(len(val) for val in vals)
        # Equal numbers for vmap: the first pair is repeated, and not counted again.
        padded = [torch.cat([val, val[:1].expand(most - len(val))]) for val in vals]
        losses = self._losses(self.averages, self._batches(padded, False))
        own = [row[: len(val)].mean() for row, val in zip(losses, vals)]
        constants = torch.tensor([self.tasks[k].constant for k in self.active])
        return torch.stack(own).double().cpu() + constants

    def finish(self, values: Tensor) -> None:
        """Note the held-out losses of an epoch; take out the networks whose fit is over."""
        rows, running = torch.tensor(self.active), []
        better = values < self.best[rows]  # False for NaN: never the best epoch
        self.best[rows] = torch.where(better, values.to(self.best), self.best[rows])
        self.since[rows] = torch.where(better, 0, self.since[rows] + 1)
        self.kept[better.to(self.kept.device)] = self.average[better.to(self.kept.device)]
        if self.epoch == RACE_EPOCHS:
            self.early[rows] = self.best[rows]
        for row, k in enumerate(self.active):
            lost = self.epoch == RACE_EPOCHS and self.best[k] > self.tasks[k].abandon_above
            over = self.epoch >= self.config.max_epochs or self.since[k] >= self.patience
            if lost or over:
                self._take_out(row, k)
            else:
                running.append(row)
        if 0 < len(running) < len(self.active):
            self._keep_rows(running)
        self.active = [self.active[row] for row in running]

    def _keep_rows(self, rows: list[int]) -> None:
        """Go on with these rows alone."""
        state = self.optimizer.state[self.weights]
        moments = {
            name: value[rows].clone() if value.shape == self.weights.shape else value
            for name, value in state.items()
        }
        self.average, self.kept = self.average[rows].clone(), self.kept[rows].clone()
        self.fixed = {name: tensor[rows] for name, tensor in self.fixed.items()}
        self._use(self.weights.detach()[rows].clone(), moments)

    def _take_out(self, row: int, k: int) -> None:
        """Write the best weights into the network."""
        net, own = self.tasks[k].net, self._views(self.kept[row : row + 1])
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name in own:
                    parameter.copy_(own[name][0])
        net.eval()
        self.results[k] = FitResult(float(self.best[k]), self.epoch, float(self.early[k]))

    def finish_all(self) -> None:
        """Write the best weights into every network that is still fitted, as after an interrupt."""
        for row, k in enumerate(self.active):
            self._take_out(row, k)
        self.active = []


def _flat(net: nn.Module) -> Tensor:
    """A copy of the trainable parameters as a vector `(P,)`."""
    return torch.cat([p.detach().reshape(-1) for p in net.parameters() if p.requires_grad])

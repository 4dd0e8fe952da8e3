"""Embedding nets of the main model: running them once per observation, and copying them.

sbi's `log_prob(theta, x)` with K parameters per observation expands x to K copies *before* its
embedding net. With a convolutional net on images, that is most of the cost of every term with
several θ per x. `embedded_once` changes no value, only how often the net runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from sbi_jeffreys._sbi import ConditionalDensityEstimator

__all__ = ["check_missing", "check_summaries", "embedded_once", "summaries_of", "summary_net"]

_CHUNK = 2_000  # observations embedded at once


def summary_net(main: ConditionalDensityEstimator) -> nn.Module:
    """A copy of the main's embedding net, z-scoring included; without one, a net that flattens x.

    The net maps x `(B, *x_shape)` to summaries `(B, ·)`. It is a copy because the symmetric stage
    changes the main's own net, and with it would change an energy fitted on its summaries.
    """
    net = main.embedding_net
    return nn.Flatten() if net is None else deepcopy(net)


@contextmanager
def embedded_once(main: ConditionalDensityEstimator, x: Tensor) -> Iterator[None]:
    """Inside, the main embeds `x` once per call, however many θ per observation come with it.

    A forward hook passes the B distinct observations to the net and repeats their summaries, which
    carry gradients as usual. A condition that is not `x` repeated as a whole is embedded as always.
    Dropout in the net is drawn once per observation instead of once per pair.
    """
    net = main.embedding_net
    if net is None:
        yield
        return
    repeats = 1

    def take_one(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        nonlocal repeats
        repeats, rest = divmod(len(inputs[0]), len(x))
        if repeats < 2 or rest or not _same(inputs[0], x):
            repeats = 1
            return None
        return (x,)

    def repeat(module: nn.Module, inputs: Any, summaries: Tensor) -> Tensor | None:
        if repeats == 1:
            return None
        return summaries.repeat(repeats, *(1,) * (summaries.ndim - 1))

    handles = [net.register_forward_pre_hook(take_one), net.register_forward_hook(repeat)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same(condition: Tensor, x: Tensor) -> bool:
    """Whether the first and last rows of a condition are x, NaN equal to NaN (missing trials)."""
    ends = (condition[: len(x)], condition[-len(x) :])
    return condition.shape[1:] == x.shape[1:] and all(
        bool(((end == x) | (torch.isnan(end) & torch.isnan(x))).all()) for end in ends
    )


@torch.no_grad()
def summaries_of(net: nn.Module, x: Tensor) -> Tensor:
    """Summaries `(N, S)` that an embedding net gives of x `(N, *x_shape)`, some x at a time."""
    return torch.cat([net(part).flatten(1) for part in x.split(_CHUNK)])


def check_missing(main: ConditionalDensityEstimator, x: Tensor) -> Tensor:
    """Return x `(B, *x_shape)` as it is, after a check that the embedding net masks its NaN.

    Raises:
        ValueError: If summaries of x with NaN are not finite.
    """
    rows = torch.isnan(x.flatten(1)).any(dim=1)
    if bool(rows.any()):  # mutant: missing-values-reach-the-main
        net = main.embedding_net
        check_summaries(summaries_of(nn.Flatten() if net is None else net, x[rows]), x[rows])
    return x


def check_summaries(summary: Tensor, x: Tensor) -> None:
    """Require finite summaries `(N, S)` of x `(N, *x_shape)`.

    Raises:
        ValueError: If some are not.
    """
    bad = (~torch.isfinite(summary)).any(dim=1)
    if not bool(bad.any()):
        return
    padded = int((bad & torch.isnan(x.flatten(1)).any(dim=1)).sum())
    raise ValueError(
        f"x: expected the embedding net to give finite summaries, got NaN or inf for "
        f"{int(bad.sum())} of {len(summary)} simulations, {padded} of which contain NaN; drop "
        "those, or use an embedding net that masks missing values (sbi's "
        "PermutationInvariantEmbedding for NaN-padded trials of varying number)."
    )

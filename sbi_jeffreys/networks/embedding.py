"""Embedding nets of the main model: running them once per observation, and copying them.

sbi's `log_prob(theta, x)` with K parameters per observation expands x to K copies *before* its
embedding net. With a convolutional net on images that is most of the cost of every term that takes
several θ per x. What is here changes no value, only how often the net runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from sbi_jeffreys._sbi import ConditionalDensityEstimator

__all__ = ["embedded_once", "summary_net"]


def summary_net(main: ConditionalDensityEstimator) -> nn.Module:
    """A copy of the main's embedding net, z-scoring included, or a flattening one.

    It maps x `(B, *x_shape)` to summaries `(B, ·)`. A copy, because the main's own net changes in
    the symmetric stage, and an energy fitted on its summaries would change with it.
    """
    net = main.embedding_net
    return nn.Flatten() if net is None else deepcopy(net)


@contextmanager
def embedded_once(main: ConditionalDensityEstimator, x: Tensor) -> Iterator[None]:
    """Inside, the main embeds `x` once per call, however many θ per observation come with it.

    A forward hook hands the net the B distinct observations and repeats their summaries, which
    carry gradients as usual. A condition that is not `x` repeated as a whole is embedded as always.
    For deterministic nets (dropout is then drawn once per observation instead of once per pair).
    Without an embedding net nothing happens.
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
    if condition.shape[1:] != x.shape[1:]:
        return False
    for a in (condition[: len(x)], condition[-len(x) :]):
        if not bool(((a == x) | (torch.isnan(a) & torch.isnan(x))).all()):
            return False
    return True

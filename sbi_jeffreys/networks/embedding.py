"""Embedding nets of the main model: running them once per observation, and sharing them.

sbi's `log_prob(theta, x)` with K parameters per observation expands x to K copies *before* its
embedding net; with a convolutional net on images that is most of the cost of every term that
takes several θ per x. Nothing here changes a value, only how often the net runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn

from sbi_jeffreys._sbi import ConditionalDensityEstimator

__all__ = ["embedded_once", "summary_net"]


def summary_net(main: ConditionalDensityEstimator) -> nn.Module:
    """A copy of the main's embedding net, z-scoring included, or a flattening one.

    A copy, because the main's own net moves in the symmetric stage, and an energy fitted on its
    summaries would move with it unasked.

    Args:
        main: A density estimator of sbi's (its `embedding_net` includes sbi's z-scoring of x).

    Returns:
        A module that maps x `(B, *x_shape)` to summaries `(B, ·)`.
    """
    net = main.embedding_net
    return nn.Flatten() if net is None else deepcopy(net)


@contextmanager
def embedded_once(main: ConditionalDensityEstimator, x: Tensor) -> Iterator[None]:
    """Inside, the main embeds `x` once, however many θ per observation it is evaluated at.

    The summaries carry gradients as they would otherwise. A condition that is not `x`, or `x`
    repeated as a whole, is embedded as always. For deterministic nets (dropout is then drawn once
    per observation instead of once per pair).

    Args:
        main: A density estimator of sbi's; without an embedding net nothing happens.
        x: The observations it will be conditioned on, shape `(B, *x_shape)`.
    """
    net = main.embedding_net
    if net is None or "forward" in vars(net):  # already embedded once by a caller
        yield
        return
    original, summaries = net.forward, net(x)

    def forward(condition: Tensor) -> Tensor:
        repeats, rest = divmod(len(condition), len(x))
        if rest or condition.shape[1:] != x.shape[1:] or not _same(condition[: len(x)], x):
            return original(condition)
        return summaries.repeat(repeats, *(1,) * (summaries.ndim - 1))

    net.forward = forward  # an attribute of the instance, which shadows the method
    try:
        yield
    finally:
        del net.forward


def _same(a: Tensor, b: Tensor) -> bool:
    """Equality of values with NaN equal to NaN: missing trials are encoded so."""
    return bool(((a == b) | (torch.isnan(a) & torch.isnan(b))).all())

"""The parameters of a small network as one vector.

A flow keeps a few thousand weights in a hundred small tensors. Per step, zeroing their gradients,
taking the norm, Adam and a moving average are mostly overhead for each tensor. On one vector of
which all tensors are views, the same operations take very little time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["flat_copy", "flattened", "shapes_of"]


def _trainable(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


def flat_copy(net: nn.Module) -> nn.Parameter | None:
    """A copy of the trainable parameters as one vector.

    None if they have several dtypes or devices, or are not floating-point numbers.
    """
    parameters = _trainable(net)
    kinds = {(p.dtype, p.device) for p in parameters}
    if len(kinds) != 1 or not parameters[0].is_floating_point():
        return None
    return nn.Parameter(torch.cat([p.detach().reshape(-1) for p in parameters]))


def shapes_of(net: nn.Module) -> list[torch.Size]:
    """Shapes of the trainable parameters, in the order of the vector."""
    return [p.shape for p in _trainable(net)]


@contextmanager
def flattened(net: nn.Module, vector: nn.Parameter | None = None) -> Iterator[list[nn.Parameter]]:
    """The parameters with which an optimiser trains `net` inside this context.

    The trainable parameters and their gradients are views of one vector until the context ends, so
    gradients have to be zeroed in place, not dropped. Where `flat_copy` returns None, the
    parameters are used as they are.

    Args:
        net: The network; its parameters keep their identity, and at the end their values.
        vector: From an earlier `flat_copy`, to which an optimiser's state belongs; the parameters'
            values are copied into it. None: a new one.

    Yields:
        The parameters, a single vector where possible.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> with flattened(net) as (vector,):
        ...     net(torch.ones(1, 3)).sum().backward()
        ...     print(vector.shape, vector.grad.sum().item())
        torch.Size([8]) 8.0
    """
    parameters = _trainable(net)
    vector = flat_copy(net) if vector is None else vector
    if vector is None:
        yield parameters
        return
    vector.grad = torch.zeros_like(vector)
    sizes = [p.numel() for p in parameters]
    for p, value, grad in zip(parameters, vector.detach().split(sizes), vector.grad.split(sizes)):
        value.copy_(p.detach().reshape(-1))
        p.data, p.grad = value.view_as(p), grad.view_as(p)
    try:
        yield [vector]
    finally:
        for p in parameters:
            p.data, p.grad = p.detach().clone(), None
        vector.grad = None

"""The parameters of a small network as one vector.

A flow keeps a few thousand weights in a hundred small tensors, and what is done to each of them per
step (zeroing gradients, their norm, Adam, a moving average) is mostly overhead. On one vector that
all of them are views of, the same steps cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["flat_copy", "flattened"]


def _trainable(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


def flat_copy(net: nn.Module) -> nn.Parameter | None:
    """The trainable parameters as one vector, of its own memory; None where they do not fit in one.

    They do where they have one floating-point dtype and device.
    """
    parameters = _trainable(net)
    kinds = {(p.dtype, p.device) for p in parameters}
    if len(kinds) != 1 or not parameters[0].is_floating_point():
        return None
    return nn.Parameter(torch.cat([p.detach().reshape(-1) for p in parameters]))


@contextmanager
def flattened(net: nn.Module, vector: nn.Parameter | None = None) -> Iterator[list[nn.Parameter]]:
    """What an optimiser has to be given to train `net` inside this context.

    One vector, with its gradient in place, that the trainable parameters are views of until the
    context ends; where they do not fit in one, they themselves. Gradients have to be zeroed in
    place, not dropped: they are views too.

    Args:
        net: The network; its parameters keep their identity, and at the end their values.
        vector: From `flat_copy`, to be used again: an optimiser's state belongs to it. It takes
            the parameters' values. None: a new one, where possible.

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

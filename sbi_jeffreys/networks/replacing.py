"""Layers of a network replaced by others that compute the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

__all__ = ["with_replaced"]

_Net = TypeVar("_Net", bound=nn.Module)


def with_replaced(net: _Net, replacement: Callable[[nn.Module], nn.Module | None]) -> _Net:
    """Replace layers of `net`, at any depth, and return `net`.

    Args:
        net: The network; it is not replaced itself.
        replacement: Returns what takes a layer's place, None where the layer stays.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        >>> with_replaced(net, lambda layer: nn.ReLU() if type(layer) is nn.Tanh else None)[1]
        ReLU()
    """
    for parent in list(net.modules()):
        for name, layer in list(parent.named_children()):
            other = replacement(layer)
            if other is not None:
                setattr(parent, name, other)
    return net

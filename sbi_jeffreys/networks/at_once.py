r"""The densities of several affine autoregressive flows by one pass.

A proxy of few simulations averages the fits to ten folds. With some hundred rows, most of the time
of ten flows is overhead. Here the weights of K flows of one architecture are the batches of one
matrix product, and all that does not depend on the rows is part of these weights:

- the masks, and the standardisation of the condition;
- the permutations between layers: the base density does not depend on the order of coordinates,
  so that each layer's weights are permuted in place of its inputs;
- tanh u = 2σ(2u) − 1, so that a hidden layer is a matrix product and a sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nflows.distributions import StandardNormal
from nflows.transforms import PointwiseAffineTransform
from nflows.transforms.permutations import Permutation
from torch import Tensor, nn

from sbi_jeffreys._sbi import (
    mean_and_std,
    parts_of_flow,
    permutation_of,
    scale_and_shift,
    version_of,
)
from sbi_jeffreys.networks.affine import FastAffineAutoregressive, fast_tanh

__all__ = ["FlowsAtOnce"]

_ROWS = 256  # rows at once: more do not stay in the cache of a processor


@dataclass(frozen=True)
class _Linear:
    """K affine maps u ↦ u W + b: W `(K, in, out)`, b `(K, 1, out)`."""

    weight: Tensor
    bias: Tensor

    def __call__(self, u: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, u, self.weight)

    def to_sigmoid(self) -> _Linear:
        """The map 2(u W + b), for a sigmoid after it."""
        return _Linear(2 * self.weight, 2 * self.bias)

    def of_sigmoid(self) -> _Linear:
        """The map (2s − 1) W + b of the output s of a sigmoid."""
        return _Linear(2 * self.weight, self.bias - self.weight.sum(dim=1, keepdim=True))


@dataclass(frozen=True)
class _Layer:
    """One autoregressive layer of K flows."""

    initial: _Linear
    context: _Linear
    hidden: list[_Linear]
    scale: _Linear
    shift: _Linear
    epsilon: float

    def __call__(self, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs `(K, R, D)` and log |det| `(K, R)` for u `(K, R, D)`, z `(K, R, P)`."""
        # 2(u W + b + 2s − 1), where s is the sigmoid of twice the context.
        bias = torch.add(self.initial.bias, torch.sigmoid(self.context(z)), alpha=4.0)
        hidden = torch.baddbmm(bias, u, self.initial.weight).sigmoid_()
        for linear in self.hidden:
            hidden = linear(hidden).sigmoid_()
        scale = nn.functional.softplus(self.scale(hidden)) + self.epsilon
        return torch.addcmul(self.shift(hidden), scale, u), scale.log().sum(dim=-1)


class FlowsAtOnce:
    """K flows of one architecture, which `of` recognises.

    Args:
        flows: sbi's `maf` estimators with the layers of `with_fast_affine_layers`.
        layers: Their layers.
        scale, shift: The standardisation of y, `(K, 1, D)` each.
    """

    def __init__(
        self, flows: Sequence[nn.Module], layers: list[_Layer], scale: Tensor, shift: Tensor
    ) -> None:
        self.layers, self.scale, self.shift = layers, scale, shift
        self._tensors = [t for f in flows for t in (*f.parameters(), *f.buffers())]
        self._seen = self._state()
        self._log_det = scale.log().sum(dim=-1) - 0.5 * scale.shape[-1] * math.log(2 * math.pi)

    def _state(self) -> list[tuple[int, int]]:
        return [(tensor.data_ptr(), version_of(tensor)) for tensor in self._tensors]

    @property
    def up_to_date(self) -> bool:
        """Whether the flows' weights are still those that this was made of."""
        return self._state() == self._seen  # mutant: old-weights-remembered

    @property
    def needs_gradient(self) -> bool:
        """Whether a gradient of the flows' weights, which this cannot give, is asked for."""
        # mutant: gradient-of-weights-lost
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self._tensors)

    @classmethod
    @torch.no_grad()
    def of(cls, flows: Sequence[Any]) -> FlowsAtOnce | None:
        """These flows; None if they are of another kind, or not of one architecture."""
        parts = [_parts(flow) for flow in flows]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or len({_shapes(flow) for flow in flows}) > 1:
            return None
        context, num = [part.condition for part in known], len(known[0].layers)
        dim = known[0].layers[0][0].features
        orders = [torch.arange(dim, device=part.scale.device) for part in known]
        layers = []
        for k in range(num):
            steps = [part.layers[k] for part in known]
            layers.append(_layer([step[0] for step in steps], context, orders))
            # mutant: permutations-forgotten
            orders = [order[step[1]] for order, step in zip(orders, steps)]
        scale = torch.stack([part.scale.expand(dim) for part in known]).unsqueeze(1)
        shift = torch.stack([part.shift.expand(dim) for part in known]).unsqueeze(1)
        return cls(flows, layers, scale, shift)

    def log_prob(self, y: Tensor, z: Tensor) -> Tensor:
        """log ℓ_k(y|z), shape `(K, R)`.

        Args:
            y: Shape `(R, D)`, or `(K, R, D)` with rows of its own for each flow.
            z: Conditions `(R, P)`.
        """
        num = len(self.scale)
        y, z = y.expand(num, *y.shape[-2:]), z.expand(num, *z.shape)
        rows = zip(y.split(_ROWS, dim=1), z.split(_ROWS, dim=1))
        return torch.cat([self._log_prob(*part) for part in rows], dim=1)

    def _log_prob(self, y: Tensor, z: Tensor) -> Tensor:
        u, log_det = torch.addcmul(self.shift, self.scale, y), self._log_det
        for layer in self.layers:
            u, of_layer = layer(u, z)
            log_det = log_det + of_layer
        return log_det - 0.5 * u.square().sum(dim=-1)


@dataclass(frozen=True)
class _Parts:
    """What a flow consists of.

    Attributes:
        scale, shift: The standardisation of y.
        layers: Each autoregressive layer and the order of its outputs for the next one.
        condition: Mean and standard deviation of the condition.
    """

    scale: Tensor
    shift: Tensor
    layers: list[tuple[Any, Tensor]]
    condition: tuple[Tensor, Tensor]


def _parts(flow: Any) -> _Parts | None:
    """The parts of one of sbi's `maf` estimators; None of any other."""
    found = parts_of_flow(flow)
    if found is None:
        return None
    transforms, base, embedding = found
    if len(transforms) < 3 or len(transforms) % 2 == 0 or not isinstance(base, StandardNormal):
        return None
    first, pairs = transforms[0], list(zip(transforms[1::2], transforms[2::2]))
    # sbi embeds the condition by its standardisation and the identity.
    steps = list(embedding) if isinstance(embedding, nn.Sequential) else []
    if len(steps) != 2 or type(steps[1]) is not nn.Identity:
        return None
    condition = mean_and_std(steps[0])
    known = type(first) is PointwiseAffineTransform and all(
        _is_known(layer) and isinstance(order, Permutation) for layer, order in pairs
    )
    if not known or condition is None:
        return None
    layers = [(layer, permutation_of(order)) for layer, order in pairs]
    return _Parts(*scale_and_shift(first), layers, condition)


def _is_known(layer: Any) -> bool:
    """Whether a layer's conditioner is sbi's: no residual blocks, tanh, nothing after it."""
    if type(layer) is not FastAffineAutoregressive:
        return False
    made: Any = layer.autoregressive_net
    blocks = list(made.blocks)
    return (
        not made.use_residual_blocks
        and all(part.activation is fast_tanh for part in (made, *blocks))
        and all(block.batch_norm is None and block.dropout.p == 0.0 for block in blocks)
    )


def _shapes(flow: nn.Module) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in flow.state_dict().values())


def _layer(
    layers: list[Any], condition: list[tuple[Tensor, Tensor]], orders: list[Tensor]
) -> _Layer:
    """One layer of all flows, whose inputs are coordinates in the given orders."""
    nets = [layer.autoregressive_net for layer in layers]
    inverse = [order.argsort() for order in orders]
    initial = _masked([net.initial_layer for net in nets])
    weight = torch.stack([w[i] for w, i in zip(initial.weight, inverse)])
    initial = _Linear(weight, initial.bias - 1.0).to_sigmoid()  # −1: that of the context's tanh
    hidden = [
        _masked([net.blocks[k].linear for net in nets]).of_sigmoid().to_sigmoid()
        for k in range(len(nets[0].blocks))
    ]
    final = _masked([net.final_layer for net in nets]).of_sigmoid()
    scale, shift = (
        _Linear(
            torch.stack([w[:, j::2][:, i] for w, i in zip(final.weight, inverse)]),
            torch.stack([b[:, j::2][:, i] for b, i in zip(final.bias, inverse)]),
        )
        for j in (0, 1)
    )
    context = _of_standardised([net.context_layer for net in nets], condition).to_sigmoid()
    return _Layer(initial, context, hidden, scale, shift, layers[0].epsilon)


def _masked(layers: list[Any]) -> _Linear:
    """Masked linear layers of all flows."""
    weight = torch.stack([(layer.weight * layer.mask).T for layer in layers])
    return _Linear(weight, torch.stack([layer.bias for layer in layers]).unsqueeze(1))


def _of_standardised(layers: list[Any], condition: list[tuple[Tensor, Tensor]]) -> _Linear:
    """Linear layers of (z − mean) / std as those of z."""
    weights, biases = [], []
    for layer, (mean, std) in zip(layers, condition):
        weight = layer.weight / std
        weights.append(weight.T)
        biases.append(layer.bias - (weight * mean).sum(dim=1))
    return _Linear(torch.stack(weights), torch.stack(biases).unsqueeze(1))

r"""Muon: steps whose matrices are orthogonal, for a network whose parameters are one vector.

Adam scales each weight by itself. Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)
replaces the momentum M = U S Vᵀ of a weight matrix by U Vᵀ, so that all directions of the matrix
move equally fast, also those whose gradients are small. The singular vectors are found by five
Newton–Schulz iterations. Scaled by 0.2 √max(rows, columns), a step is as large as one of Adam's
(Liu et al. 2025, arXiv 2502.16982), and one learning rate does for both.

`torch.optim.Muon` takes one matrix after the other. A flow has forty small ones, of which those of
one shape are multiplied together here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

__all__ = ["Muon", "orthogonalised"]

_MOMENTUM = 0.9
_SCALE = 0.2  # root mean square of a matrix's step in units of the learning rate, as Adam's is
_ITERATIONS = 5
_LARGEST = 256  # shorter side up to which the iterations cost no more than the layer itself
_A, _B, _C = 3.4445, -4.7750, 2.0315  # of the quintic, from Jordan et al.


class Muon(Adam):
    """Muon for the weight matrices in a vector of parameters, Adam for everything else.

    Args:
        vector: All trainable parameters of a network, as `flat_copy` returns them.
        shapes: Shapes of the parameters in the order of the vector. Those with two dimensions, both
            above one and the shorter one at most 256, are matrices.
        lr: Learning rate.
        fused: Whether Adam's fused kernel is used.
    """

    def __init__(
        self, vector: nn.Parameter, shapes: Sequence[torch.Size], lr: float, fused: bool
    ) -> None:
        super().__init__([vector], lr=lr, fused=fused)
        # In the group, because a pickled optimiser keeps nothing else beside its state.
        self.param_groups[0]["shapes"] = tuple(tuple(shape) for shape in shapes)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; `closure` as for Adam."""
        group = self.param_groups[0]
        vector = group["params"][0]
        before = vector.clone()
        loss = super().step(closure)
        state = self.state[vector]
        momentum = state.setdefault("momentum", torch.zeros_like(vector))
        momentum.lerp_(vector.grad, 1 - _MOMENTUM)
        direction = vector.grad.lerp(momentum, _MOMENTUM)
        for shape, where in _matrices(group["shapes"], vector.device):
            step = orthogonalised(direction[where].view(-1, *shape))
            size = group["lr"] * _SCALE * math.sqrt(max(shape))
            vector[where] = before[where] - size * step.flatten()  # mutant: matrices-by-adam
        return loss


@lru_cache(maxsize=32)
def _matrices(
    shapes: tuple[tuple[int, ...], ...], device: torch.device
) -> list[tuple[tuple[int, ...], Tensor]]:
    """The shapes of matrices, each with the indices of all matrices of this shape in the vector."""
    found: dict[tuple[int, ...], list[Tensor]] = {}
    start = 0
    for shape in shapes:
        num = math.prod(shape)
        if len(shape) == 2 and 1 < min(shape) <= _LARGEST:  # mutant: iterations-whatever-they-cost
            found.setdefault(shape, []).append(torch.arange(start, start + num, device=device))
        start += num
    return [(shape, torch.cat(where)) for shape, where in found.items()]


def orthogonalised(matrices: Tensor) -> Tensor:
    """About U Vᵀ for each matrix U S Vᵀ: singular values between 0.7 and 1.2, those of zero kept.

    Args:
        matrices: Shape `(K, N, M)`.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.flatten(1).norm(dim=1).view(-1, 1, 1) + torch.finfo(x.dtype).tiny)
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=_B, alpha=_C), x, beta=_A)
    return x if wide else x.mT

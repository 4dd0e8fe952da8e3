r"""Linear summaries of a wide vector: a few coordinates, and how long the rest is.

A smooth curve in white noise, y = m(θ) + σε with hundreds of outputs, depends on θ in a few
directions U alone. With w = (y − c)/d, where d are the outputs' scales,

    s(y) = (U'w, log |w − UU'w|).

If the rest's direction on the sphere is uniform whatever θ is, s is sufficient, and the density of
y is that of s times a known factor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["LinearSummaries"]

_LEAST = 1e-12  # length of the rest


class LinearSummaries(nn.Module):
    """y `(*B, D)` → k coordinates and the log length of the rest, `(*B, k + 1)`.

    Args:
        centre: c, `(D,)`.
        scale: d, `(D,)`.
        directions: U, orthonormal columns or columns of zeros, `(D, k)`.

    Example:
        >>> summaries = LinearSummaries(torch.zeros(3), torch.ones(3), torch.eye(3)[:, :1])
        >>> summaries(torch.tensor([[5.0, 3.0, 4.0]])).exp()[:, 1]
        tensor([5.])
    """

    def __init__(self, centre: Tensor, scale: Tensor, directions: Tensor) -> None:
        super().__init__()
        # Constants, but parameters, as everything that an embedding net has.
        self.centre = nn.Parameter(centre, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.directions = nn.Parameter(directions, requires_grad=False)

    def split(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """U'w `(*B, k)`, the rest's direction `(*B, D)`, and its length `(*B, 1)`."""
        white = (y - self.centre) / self.scale
        along = white @ self.directions
        across = white - along @ self.directions.T
        length = torch.linalg.vector_norm(across, dim=-1, keepdim=True).clamp_min(_LEAST)
        return along, across / length, length

    def forward(self, y: Tensor) -> Tensor:
        along, _, length = self.split(y)
        return torch.cat([along, length.log()], dim=-1)

    def join(self, summaries: Tensor, across: Tensor) -> Tensor:
        """The y with these summaries `(*B, k + 1)` and this direction of the rest, `(*B, D)`."""
        along, log_length = summaries[..., :-1], summaries[..., -1:]
        white = along @ self.directions.T + log_length.exp() * across
        return self.centre + self.scale * white

    def log_det(self, y: Tensor) -> Tensor:
        """log density of y over that of s(y), the direction being uniform on its sphere, `(*B,)`.

        With n = D − k, the rest's length r has the density p(log r)/r, and its direction one over
        the sphere's area, 2 π^{n/2} / Γ(n/2), times r^{n−1}.
        """
        length = self.split(y)[2].squeeze(-1)
        n = self.directions.shape[0] - self.directions.shape[1]
        log_area = math.log(2) + 0.5 * n * math.log(math.pi) - math.lgamma(0.5 * n)
        return -self.scale.log().sum() - n * length.log() - log_area

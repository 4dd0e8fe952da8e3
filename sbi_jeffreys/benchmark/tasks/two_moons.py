"""Two moons: a crescent with two mirror images (Lueckmann et al. 2021, supplement T.8).

First used by Greenberg et al. (2019), "Automatic posterior transformation".
"""

from __future__ import annotations

import math

import torch
from sbi.utils import BoxUniform
from torch import Tensor

from ._reference import rejection_sample
from ._registry import register_task
from ._truncated import INSIDE
from .base import Task

_OFFSET = 0.25
_RADIUS_MEAN = 0.1
_RADIUS_STD = 0.01


@register_task
class TwoMoons(Task):
    """x = crescent + (−|θ₁ + θ₂|, −θ₁ + θ₂)/√2 with θ ∼ U(−1, 1)².

    The crescent is (r cos a + 0.25, r sin a), a ∼ U(−π/2, π/2), r ∼ N(0.1, 0.01²).
    """

    name = "two_moons"
    dim_theta = 2
    dim_x = 2
    exact_reference = True

    def __init__(self) -> None:
        self.prior = BoxUniform(-torch.ones(2), torch.ones(2))

    def simulate(self, theta: Tensor) -> Tensor:
        return (_crescent(len(theta)) + _shift(theta.double())).to(theta.dtype)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """log p(x|θ) for broadcastable `(*B, 2)`, `(*B, 2)` → `(*B,)`.

        Normalised over x, unlike sbibm's, which leaves out the Jacobian π r of the polar
        coordinates; r < 0 (ten standard deviations away) is neglected, as there.
        """
        p = x.double() - _shift(theta.double())
        u, v = p[..., 0] - _OFFSET, p[..., 1]
        radius = torch.sqrt(u**2 + v**2).clamp_min(1e-12)
        standardised = (radius - _RADIUS_MEAN) / _RADIUS_STD
        log_radial = -0.5 * standardised**2 - math.log(_RADIUS_STD * math.sqrt(2 * math.pi))
        log_density = log_radial - torch.log(math.pi * radius)
        return torch.where(u >= 0, log_density, -torch.inf).to(theta.dtype)

    def sample_reference(self, x: Tensor, num_samples: int) -> Tensor:
        """Exact samples of p(θ|x).

        The prior is flat and θ ↦ x − crescent is a rotation on each side of θ₁ + θ₂ = 0, so
        p(θ|x) is the crescent's law pulled back through both branches, cut to the prior's box.
        A draw with |θ₁ + θ₂| < 0 has no preimage and is dropped (sbibm reflects it).
        """
        observed = self.check_observation(x)

        def propose(count: int) -> tuple[Tensor, Tensor]:
            crescent = _crescent(count)
            along = crescent[:, 0] - observed[0]  # |θ₁ + θ₂|/√2
            across = observed[1] - crescent[:, 1]  # (θ₂ − θ₁)/√2
            sign = 1.0 - 2.0 * torch.randint(0, 2, (count,), dtype=torch.float64)
            theta = torch.stack((sign * along - across, sign * along + across), -1) / math.sqrt(2)
            accepted = (along >= 0) & (theta.abs() <= INSIDE).all(-1)
            return theta, accepted

        return rejection_sample(propose, num_samples, self.name).float()

    def modes(self, theta: Tensor, x: Tensor) -> Tensor:
        """0 where θ₁ + θ₂ < 0, else 1: `(N, 2)` → `(N,)`."""
        return (theta.sum(-1) >= 0).long()


def _crescent(count: int) -> Tensor:
    """The noise: `(count, 2)`, float64."""
    angle = math.pi * (torch.rand(count, dtype=torch.float64) - 0.5)
    radius = _RADIUS_MEAN + _RADIUS_STD * torch.randn(count, dtype=torch.float64)
    return torch.stack((radius * torch.cos(angle) + _OFFSET, radius * torch.sin(angle)), -1)


def _shift(theta: Tensor) -> Tensor:
    """Where θ moves the crescent: `(*B, 2)` → `(*B, 2)`."""
    along, across = theta[..., 0] + theta[..., 1], theta[..., 1] - theta[..., 0]
    return torch.stack((-along.abs(), across), -1) / math.sqrt(2)

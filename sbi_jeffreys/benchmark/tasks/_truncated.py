"""Normal distributions cut to an interval: probabilities and samples, accurate in the tails."""

from __future__ import annotations

import torch
from torch import Tensor

# Below this many standard deviations Φ underflows in float64, and ndtri(Φ) with it.
_FAR = -36.0

# Shrinks a box so that a float64 draw inside it stays inside when rounded to float32.
INSIDE = 1.0 - 1e-7


def log_interval_probability(mean: Tensor, std: float | Tensor, low: float, high: float) -> Tensor:
    """log P(low < z < high) for z ∼ N(mean, std²), elementwise."""
    near, far = _standardise(mean, std, low, high)[:2]
    log_near, log_far = torch.special.log_ndtr(near), torch.special.log_ndtr(far)
    return log_near + torch.log1p(-torch.exp(log_far - log_near))


def sample_truncated_normal(mean: Tensor, std: float | Tensor, low: float, high: float) -> Tensor:
    """One draw of N(mean, std²) given low < z < high per element of `mean`, which is float64."""
    near, far, flipped = _standardise(mean, std, low, high)
    uniform = torch.rand_like(mean)
    cdf_far = torch.special.ndtr(far)
    z = torch.special.ndtri(cdf_far + uniform * (torch.special.ndtr(near) - cdf_far))
    # Where Φ underflows, the density falls like exp(near · z): an exponential from the edge.
    exponential = near + torch.log1p(-uniform) / near.abs().clamp_min(1.0)
    z = torch.where(near < _FAR, exponential, z)
    draws = mean + std * torch.where(flipped, -z, z)
    return draws.clamp(low * INSIDE, high * INSIDE)


def _standardise(
    mean: Tensor, std: float | Tensor, low: float, high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The ends in standard deviations, mirrored so that the interval lies on the left.

    Φ keeps its relative precision in the lower tail. Returns the upper end, the lower end
    (upper ≥ lower), and where the axis was mirrored.
    """
    lower, upper = (low - mean) / std, (high - mean) / std
    flipped = lower + upper > 0
    return torch.where(flipped, -lower, upper), torch.where(flipped, -upper, lower), flipped

"""Which outputs of a wide x depend on θ at all.

Outputs that are independent of θ and of all other outputs (distractors, dead pixels, a baseline)
carry no information, but a density of them costs as much as one of the others, and its errors add
up. With enough simulations they can be told apart one by one: does a quadratic of θ explain the
ranks of an output, or their distance from the middle?
"""

from __future__ import annotations

import torch
from scipy.stats import chi2
from scipy.stats import f as f_distribution
from torch import Tensor

from sbi_jeffreys.networks.standardised import WIDE

__all__ = ["WIDE", "informative_outputs", "sums_of_squares"]

_LEVEL = 0.01  # level of the test of one output
_NOISE = 0.001  # level of the joint test of the outputs that this test finds independent of θ
_PAIRS_PER_FEATURE = 4


def informative_outputs(theta: Tensor, x: Tensor) -> Tensor:
    """Columns of x that depend on θ, where x is wide and most of its columns do not.

    Each column's normal scores, and their absolute values, are regressed on a quadratic of the
    normal scores of θ (a line where pairs are few); an F-test at 1 % decides. The others are left
    out only where they are at least half of the columns, and where their p-values together are
    those of noise (Fisher's test at 0.1 %): many weak dependences together may be informative.

    Args:
        theta: Training parameters `(N, D)`.
        x: Training simulations `(N, dim_x)`.

    Returns:
        Indices of the columns to keep, in order; all of them where x has at most 30 columns.
    """
    every = torch.arange(x.shape[1], device=x.device)
    if len(every) <= WIDE:
        return every
    z = _normal_scores(theta)
    features = torch.cat([torch.ones_like(z[:, :1]), z], dim=1)
    i, j = torch.triu_indices(z.shape[1], z.shape[1])
    quadratic = torch.cat([features, z[:, i] * z[:, j]], dim=1)
    if len(z) >= _PAIRS_PER_FEATURE * quadratic.shape[1]:
        features = quadratic
    elif len(z) < _PAIRS_PER_FEATURE * features.shape[1]:
        return every
    scores = _normal_scores(x)
    p_location, p_scale = _p_values(features, scores), _p_values(features, scores.abs())
    p = 1 - (1 - torch.minimum(p_location, p_scale)) ** 2  # p-value of the smaller of the two
    kept = p < _LEVEL
    rest = (p[~kept] - _LEVEL) / (1 - _LEVEL)
    fisher = -2 * float(rest.clamp_min(1e-300).log().sum())
    looks_like_noise = float(chi2.sf(fisher, 2 * max(1, len(rest)))) > _NOISE
    few = 0 < int(kept.sum()) <= len(every) // 2
    return every[kept.to(x.device)] if few and looks_like_noise else every


def _normal_scores(values: Tensor) -> Tensor:
    """Columns `(N, D)` by their ranks as normal quantiles, on the CPU, in float64."""
    values = values.detach().cpu().double()
    # Ties, as among counts or dead pixels, are broken at random, and differently in each column. If
    # the order of the rows broke them, all columns of ties would have the same ranks.
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(values.shape, generator=generator)
    order = noise.argsort(dim=0)  # mutant: ties-alike-in-all-columns
    ranks = values.gather(0, order).argsort(dim=0, stable=True).argsort(dim=0)
    ranks = torch.empty_like(ranks).scatter_(0, order, ranks).double()
    return torch.special.ndtri((ranks + 0.5) / len(values))


def sums_of_squares(features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squares of columns `(N, D)`, explained by features `(N, F)` and in all, `(D,)`."""
    target = target - target.mean(dim=0)
    basis, _ = torch.linalg.qr(features)
    explained = (basis.T @ target).square().sum(dim=0)
    return explained, target.square().sum(dim=0).clamp_min(1e-12)


def _p_values(features: Tensor, target: Tensor) -> Tensor:
    """p-values of F-tests whether features `(N, F)`, a constant first, explain columns `(N, D)`."""
    num, size = features.shape
    explained, total = sums_of_squares(features, target)
    ratio = (explained / (size - 1)) / ((total - explained).clamp_min(1e-12) / (num - size))
    return torch.as_tensor(f_distribution.sf(ratio.numpy(), size - 1, num - size))

"""Student kernels about weighted draws: proposals that follow a posterior.

Both kinds take draws at several observations with their log weights, and give a density that can be
drawn from: one wide kernel with the moments of the draws, and many narrow ones about resampled
draws. Parameters are measured in units of their spread, so that their own units do not matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Kernels", "WeightedDraws"]

_CENTRES = 32  # kernels per observation and round
_WIDTHS = (1.0, 0.3, 0.1)  # widths of the kernels, relative to the spread of the weighted draws
_DEGREES = 5.0  # degrees of freedom of the Student kernels
_FAR = 1e15  # units: the square of a larger θ may not be finite in float32


@dataclass(frozen=True)
class WeightedDraws:
    """Weighted draws in units of their spread, and the moments that both kinds of kernels share.

    Attributes:
        theta: Draws in units of `unit`, `(B, K, D)`.
        weights: Their weights, which sum to one, `(B, K)`.
        mean: Weighted mean in the same units, `(B, 1, D)`.
        covariance: Weighted covariance in the same units, `(B, D, D)`.
        unit: Unit of each parameter at each observation, `(B, D)`.
    """

    theta: Tensor
    weights: Tensor
    mean: Tensor
    covariance: Tensor
    unit: Tensor

    @classmethod
    def of(cls, theta: Tensor, log_weights: Tensor) -> WeightedDraws:
        """From draws `(K, B, D)` and their log weights `(K, B)`."""
        unit = _unit(theta)
        weights, draws = _normalised(theta / unit, log_weights)
        mean = (weights.unsqueeze(-1) * draws).sum(dim=1, keepdim=True)
        return cls(draws, weights, mean, _covariance(weights, draws, mean), unit)


@dataclass(frozen=True)
class Kernels:
    """Student kernels about J centres per observation, with one covariance each.

    Attributes:
        centres: Centres in units of `unit`, `(B, J, D)`.
        factor: Cholesky factor of the kernels' scale matrix, in the same units, `(B, D, D)`.
        scales: Factor of each kernel's width, `(J,)`.
        unit: Unit of each parameter at each observation, `(B, D)`.
    """

    centres: Tensor
    factor: Tensor
    scales: Tensor
    unit: Tensor

    @classmethod
    def moments(cls, draws: WeightedDraws) -> Kernels:
        """One component with the moments of the draws."""
        factor = _cholesky(draws.covariance)
        return cls(draws.mean, factor, torch.ones(1).to(factor), draws.unit)

    @classmethod
    def about(cls, draws: WeightedDraws) -> Kernels:
        """Kernels of three widths about resampled draws: they follow several narrow modes."""
        dim = draws.theta.shape[-1]
        rows = torch.multinomial(draws.weights, _CENTRES, replacement=True)
        centres = draws.theta.gather(1, rows.unsqueeze(-1).expand(-1, -1, dim))
        bandwidth = (4.0 / (_CENTRES * (dim + 2))) ** (2.0 / (dim + 4))
        factor = _cholesky(bandwidth * draws.covariance)
        scales = torch.tensor(_WIDTHS).repeat(_CENTRES // len(_WIDTHS) + 1)[:_CENTRES]
        return cls(centres, factor, scales.to(factor), draws.unit)

    def sample(self, num: int) -> Tensor:
        """Draws `(num, B, D)`."""
        batch, centres, dim = self.centres.shape
        which = torch.randint(centres, (batch, num, 1), device=self.factor.device)
        noise = torch.randn(batch, num, dim).to(self.factor)
        chi = torch.distributions.Chi2(torch.tensor(_DEGREES)).sample((batch, num, 1))
        noise = noise * (_DEGREES / chi.to(noise)).sqrt()
        means = self.centres.gather(1, which.expand(-1, -1, dim))
        noise = self.scales[which] * (noise @ self.factor.transpose(1, 2))
        return (means + noise).transpose(0, 1) * self.unit

    def log_prob(self, theta: Tensor) -> Tensor:
        """Log density of θ `(K, B, D)`, `(K, B)`."""
        dim, origin = theta.shape[-1], self.centres[:, :1]

        def white(points: Tensor) -> Tensor:
            # From a point nearby: θ may be thousands of posterior widths away from 0.
            centred = (points - origin).transpose(1, 2)  # mutant: distances-from-zero
            solved = torch.linalg.solve_triangular(self.factor, centred, upper=False)
            return solved.transpose(1, 2)

        points = (theta / self.unit).transpose(0, 1)
        squares = torch.cdist(white(points), white(self.centres)).square()
        log_det = (self.factor.diagonal(dim1=1, dim2=2).log() + self.unit.log()).sum(dim=-1)
        constant = (
            math.lgamma((_DEGREES + dim) / 2)
            - math.lgamma(_DEGREES / 2)
            - 0.5 * dim * math.log(_DEGREES * math.pi)
        )
        log_kernel = -0.5 * (_DEGREES + dim) * torch.log1p(squares / self.scales**2 / _DEGREES)
        log_kernel = log_kernel - dim * self.scales.log()
        total = torch.logsumexp(log_kernel, dim=-1) - math.log(self.centres.shape[1])
        return (total + (constant - log_det).unsqueeze(-1)).T


def _unit(theta: Tensor) -> Tensor:
    """The spread of each parameter over draws `(K, B, D)`, whatever its unit, `(B, D)`.

    The spread is rounded to a power of two, because dividing by one causes no rounding errors.
    """
    low, high = theta.nanquantile(torch.tensor([0.25, 0.75]).to(theta), dim=0)
    spread = high - low
    usable = torch.isfinite(spread) & (spread > 0)
    unit = torch.where(usable, spread, 1.0).log2().round().exp2()
    return unit  # mutant: kernels-in-units-of-one


def _normalised(theta: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights `(B, K)` that sum to one, equal where none is positive, and draws `(B, K, D)`.

    A main may draw θ as far away as infinity. Such draws have no weight, but their moments would
    be NaN: they are replaced by 0.
    """
    usable = torch.isfinite(log_weights).any(dim=0)
    weights = torch.softmax(torch.where(usable, log_weights, 0.0), dim=0)
    near = (theta.abs() < _FAR).all(dim=-1)  # mutant: far-draws-in-moments
    theta = torch.where(near.unsqueeze(-1), theta, 0.0)
    return weights.T, theta.transpose(0, 1)


def _covariance(weights: Tensor, draws: Tensor, mean: Tensor) -> Tensor:
    """Weighted covariance `(B, D, D)`, nearer its diagonal the fewer draws are effective."""
    dim = draws.shape[-1]
    centred = draws - mean
    covariance = torch.einsum("bk,bkd,bke->bde", weights, centred, centred)
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    # The covariance is at least as wide as the spacing of the draws, so that one heavy weight does
    # not collapse it. The spread is that of quartiles, which a few draws far away do not move.
    low, high = draws.quantile(torch.tensor([0.25, 0.75]).to(draws), dim=1)
    spread = ((high - low) / 1.35).square()
    floor = spread.clamp_min(1e-24) * (1e-2 / draws.shape[1]) ** 2
    effective = 1 / weights.square().sum(dim=1)
    shrinkage = (dim / (effective + dim)).reshape(-1, 1, 1)
    shrunk = (1 - shrinkage) * covariance + shrinkage * torch.diag_embed(diagonal)
    return shrunk + torch.diag_embed(floor)


def _cholesky(covariance: Tensor) -> Tensor:
    """Cholesky factors `(B, D, D)`; of the diagonal where rounding made a matrix indefinite."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    variances = covariance.diagonal(dim1=1, dim2=2).clamp_min(1e-24)
    return torch.where(failed.reshape(-1, 1, 1) > 0, torch.diag_embed(variances.sqrt()), factor)

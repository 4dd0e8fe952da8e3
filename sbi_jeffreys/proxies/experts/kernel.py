r"""A smooth likelihood in closed form: kernel ridge regression with Gaussian noise.

The mean of a simulator is rarely a polynomial of θ, but it is nearly always smooth. Kernel ridge
regression finds a smooth mean in a second, from few simulations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sbi_jeffreys.networks.transforms import scale_of
from sbi_jeffreys.proxies.experts.gaussian import (
    GaussianRegression,
    shrunk_covariance,
    standardised,
)

__all__ = ["KernelRegression"]

_KERNEL_RIDGES = torch.logspace(-6, 2, 17, dtype=torch.float64)
_LENGTHS = (0.5, 1.0, 2.0, 4.0)  # lengths ℓ tried, in standard deviations of z times √D
_LINEAR = 10.0  # prior variance of the kernel's linear part, beside 1 of the smooth part
_ROWS = 500  # rows of the kernel matrix at once, for prediction: bounds memory
_MOST = 2000  # pairs that a kernel regression is fitted to: the cost is cubic in their number


class KernelRegression(GaussianRegression):
    """ℓ(y|z) = N(y; m(z), Σ), m a kernel ridge regression: a straight line plus something smooth.

    The kernel is k(z, z') = 10 φ(z)'φ(z') + exp(−|z − z'|² / 2ℓ²D), φ(z) = (1, z), of standardised
    z. The length ℓ maximises the leave-one-out likelihood, and each output has the ridge of least
    leave-one-out error. One eigendecomposition per length gives them in closed form. At most 2,000
    pairs are used.

    Args:
        dim_z: Dimensions of the condition.
        dim_y: Dimensions of y.
        lengths: Values of the length ℓ that are tried.
    """

    points: Tensor
    length: Tensor
    shift: Tensor

    def __init__(self, dim_z: int, dim_y: int, lengths: tuple[float, ...] = _LENGTHS) -> None:
        super().__init__(dim_z, dim_y, 1)
        self.lengths = lengths
        self.register_buffer("points", torch.zeros(0, dim_z, dtype=torch.float64))
        self.register_buffer("length", torch.ones((), dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(dim_y, dtype=torch.float64))

    def unfitted(self) -> KernelRegression:
        """A regression that is not fitted, with the length ℓ that was found here."""
        dims = len(self.centre), len(self.cholesky)
        return KernelRegression(*dims, (float(self.length),)).to(self.scale.device)

    def fit(self, z: Tensor, y: Tensor, weights: Tensor | None = None) -> KernelRegression:
        """Fit to pairs z `(N, dim_z)`, y `(N, dim_y)`, or to 2,000 of them.

        With weights `(N,)`, the noise of a pair has the covariance Σ / weight.
        """
        rows = torch.randperm(len(z))[:_MOST].to(z.device).sort().values
        self.centre, self.scale = z.mean(dim=0), scale_of(z)
        chosen = None if weights is None else weights[rows]
        target, self.shift, spread, root = standardised(y[rows], chosen)
        self.points, best = ((z - self.centre) / self.scale).double()[rows], math.inf
        for length in self.lengths:
            gram = self._kernel(self.points, torch.tensor(length).to(self.points)) * root * root.T
            values, vectors = torch.linalg.eigh(gram)
            values = values.clamp_min(0.0)
            residuals, ridges = _leave_one_out_residuals(values, vectors, target)
            covariance = shrunk_covariance(residuals)
            if (value := float(torch.logdet(covariance))) < best:
                best = value
                solution = (vectors.T @ target) / (values.unsqueeze(1) + ridges)
                self.coefficients = root * (vectors @ solution) * spread
                self.length = torch.tensor(length).to(self.points)
                self.cholesky = (torch.linalg.cholesky(covariance) * spread.unsqueeze(1)).to(y)
                leave_one_out = y[rows] - (residuals / root * spread).to(y)
        self.leave_one_out = self.mean(z)
        self.leave_one_out[rows] = leave_one_out
        return self

    def _kernel(self, points: Tensor, length: Tensor) -> Tensor:
        """k of standardised points `(N, dim_z)` and those of the fit, shape `(N, K)`."""
        inner = points @ self.points.T
        smooth = self._smooth(points, length)
        return smooth + _LINEAR * (1.0 + inner)  # mutant: kernel-without-smooth-part

    def mean(self, z: Tensor) -> Tensor:
        """m(z), shape `(*B, dim_y)`."""
        points = ((z - self.centre) / self.scale).double()
        # The kernel's linear part, summed over the points of the fit beforehand.
        slopes = _LINEAR * (self.points.T @ self.coefficients)
        shift = self.shift + _LINEAR * self.coefficients.sum(dim=0)
        parts = points.reshape(-1, points.shape[-1]).split(_ROWS)
        smooth = torch.cat([self._smooth(part, self.length) @ self.coefficients for part in parts])
        mean = smooth.reshape(*z.shape[:-1], smooth.shape[-1]) + points @ slopes + shift
        return mean.to(z)

    def _smooth(self, points: Tensor, length: Tensor) -> Tensor:
        """exp(−|z − z'|² / 2ℓ²D) of standardised points `(N, dim_z)` and those of the fit."""
        width = float(length**2 * points.shape[1])
        norms = points.pow(2).sum(dim=1, keepdim=True) + self.points.pow(2).sum(dim=1)
        # One pass for the exponent: this is most of the cost of every evaluation.
        exponent = torch.addmm(norms, points, self.points.T, beta=-0.5 / width, alpha=1 / width)
        return exponent.clamp_max(0.0).exp()


def _leave_one_out_residuals(
    values: Tensor, vectors: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Residual of each pair under the fit to all others, at the best ridge of each output.

    Args:
        values: Eigenvalues of the Gram matrix, `(N,)`.
        vectors: Its eigenvectors, `(N, N)`.
        target: Standardised outputs `(N, dim_y)`.

    Returns:
        Residuals `(N, dim_y)` and ridges `(dim_y,)`.
    """
    projection, grid = vectors.T @ target, _KERNEL_RIDGES.to(values)
    residuals = []
    for ridge in grid:
        shrink = values / (values + ridge)
        # mutant: kernel-residuals-in-sample
        leave_one_out = (1.0 - (vectors**2) @ shrink).clamp_min(1e-6)
        fitted = vectors @ (shrink.unsqueeze(1) * projection)
        residuals.append((target - fitted) / leave_one_out.unsqueeze(1))
    stacked = torch.stack(residuals)
    best = stacked.pow(2).mean(dim=1).argmin(dim=0)  # mutant: one-ridge-for-all-outputs
    outputs = torch.arange(target.shape[1], device=target.device)
    return stacked[best, :, outputs].T, grid[best]

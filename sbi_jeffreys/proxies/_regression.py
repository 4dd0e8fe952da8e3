r"""Likelihoods in closed form: y = m(θ) + e, m a ridge polynomial and e Gaussian.

The oldest synthetic likelihood (Wood 2010) is the right one for many simulators with additive
noise, and then no network fitted to a thousand simulations comes near it. It costs milliseconds, so
it is always tried; the stacking weights decide. Its residuals, whitened, are also what a network
may model in place of y: the network then learns how the simulator *differs* from the regression.

A polynomial is rarely the simulator's mean, but the mean is nearly always smooth. Kernel ridge
regression finds it in a second where a flow of x spends its simulations on it: on the tuning
tasks, 1,000 simulations, noise taken as constant, 1 to 6 nats above the polynomial on four of six.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AroundRegression", "GaussianRegression", "KernelRegression", "num_features"]

_RIDGE_GRID = torch.logspace(-3, 3, 13, dtype=torch.float64)
_KERNEL_RIDGES = torch.logspace(-6, 2, 17, dtype=torch.float64)
_LENGTHS = (0.5, 1.0, 2.0, 4.0)  # in standard deviations of θ, per root of its dimensions
_LINEAR = 10.0  # prior variance of the kernel's linear part, beside 1 of the smooth part
_ROWS = 500  # of the kernel matrix at once, for prediction: bounds memory
_MOST = 2000  # pairs that a kernel regression is fitted to: its cost grows with their cube


def num_features(dim: int, degree: int) -> int:
    """Polynomial features in `dim` dimensions up to `degree` (1 or 2), the constant included."""
    return 1 + dim + (dim * (dim + 1) // 2 if degree == 2 else 0)


def _shrunk_covariance(residuals: Tensor) -> Tensor:
    """Covariance of residuals `(N, D)` shrunk towards its diagonal; positive definite.

    Oracle-approximating shrinkage (Chen et al. 2010, arXiv 0907.4698, eq. 23) of the correlations.
    """
    num, dim = residuals.shape
    std = residuals.pow(2).mean(dim=0).sqrt().clamp_min(1e-12)
    correlation = (residuals / std).T @ (residuals / std) / num
    squares, ratio = float((correlation**2).sum()), 1.0 - 2.0 / dim
    excess = squares - dim  # how far the correlations are from the identity
    estimate = (ratio * squares + dim**2) / (num + ratio)
    shrinkage = 1.0 if excess <= estimate else estimate / excess
    eye = torch.eye(dim).to(correlation)
    return ((1 - shrinkage) * correlation + shrinkage * eye) * std * std.unsqueeze(1)


class GaussianRegression(nn.Module):
    """ℓ(y|z) = N(y; W'φ(z), Σ), φ the polynomials of standardised z up to `degree`.

    The ridge penalty maximises the leave-one-out likelihood, and Σ is the (shrunk) covariance of
    the leave-one-out residuals: an overfitted mean pays with a wider Σ. `fit` is in closed form.

    Args:
        dim_z: Dimensions of the condition.
        dim_y: Dimensions of y.
        degree: 1 or 2.
    """

    centre: Tensor
    scale: Tensor
    coefficients: Tensor
    cholesky: Tensor
    #: What the fits to all other pairs predict for each pair, `(N, dim_y)`. In-sample residuals are
    #: smaller than those to come.
    left_out: Tensor

    def __init__(self, dim_z: int, dim_y: int, degree: int) -> None:
        super().__init__()
        self.degree = degree
        self.register_buffer("centre", torch.zeros(dim_z))
        self.register_buffer("scale", torch.ones(dim_z))
        self.register_buffer("coefficients", torch.zeros(num_features(dim_z, degree), dim_y))
        self.register_buffer("cholesky", torch.eye(dim_y))

    def fit(self, z: Tensor, y: Tensor) -> GaussianRegression:
        """Fit to pairs z `(N, dim_z)`, y `(N, dim_y)`; by least squares, whatever N is."""
        self.centre = z.mean(dim=0)
        self.scale = z.std(dim=0).clamp_min(1e-7)
        shift, spread = y.double().mean(dim=0), y.double().std(dim=0).clamp_min(1e-12)
        target = (y.double() - shift) / spread
        u, s, vt = torch.linalg.svd(self._features(z).double(), full_matrices=False)
        projection, best = u.T @ target, math.inf
        for ridge in _RIDGE_GRID.to(z.device):
            shrink = s**2 / (s**2 + ridge)
            # The residual of each pair under the fit to all others, from the leverages.
            left_out = 1.0 - ((u**2) @ shrink).clamp_max(1.0 - 1e-6)
            residuals = (target - u @ (shrink.unsqueeze(1) * projection)) / left_out[:, None]
            covariance = _shrunk_covariance(residuals)
            if (value := float(torch.logdet(covariance))) < best:
                best = value
                self.left_out = (y - residuals * spread).to(y)
                weights = vt.T @ ((s / (s**2 + ridge)).unsqueeze(1) * projection) * spread
                weights[0] += shift
                self.coefficients = weights.to(y)
                factor = torch.linalg.cholesky(covariance)
                self.cholesky = (factor * spread.unsqueeze(1)).to(y)
        return self

    def _features(self, z: Tensor) -> Tensor:
        z = (z - self.centre) / self.scale
        columns = [torch.ones_like(z[..., :1]), z]
        if self.degree == 2:
            i, j = torch.triu_indices(z.shape[-1], z.shape[-1]).to(z.device)
            columns.append(z[..., i] * z[..., j])
        return torch.cat(columns, dim=-1)

    def mean(self, z: Tensor) -> Tensor:
        """m(z), shape `(*B, dim_y)`."""
        return self._features(z) @ self.coefficients

    def whiten(self, y: Tensor, z: Tensor, mean: Tensor | None = None) -> Tensor:
        """Residuals L⁻¹(y − m(z)) with Σ = LL'; standard normal where the model is right.

        Args:
            y: Shape `(*B, dim_y)`.
            z: Shape `(*B, dim_z)`.
            mean: In place of m(z): rows of `left_out` for the pairs of the fit.
        """
        residuals = (y - (self.mean(z) if mean is None else mean)).unsqueeze(-1)
        return torch.linalg.solve_triangular(self.cholesky, residuals, upper=False).squeeze(-1)

    def colour(self, e: Tensor, z: Tensor) -> Tensor:
        """The inverse of `whiten`: y = m(z) + L e."""
        return self.mean(z) + e @ self.cholesky.T

    @property
    def log_det(self) -> Tensor:
        """log |det ∂ whiten / ∂y|, the same everywhere."""
        return -self.cholesky.diagonal().log().sum()

    def log_prob(self, y: Tensor, z: Tensor, mean: Tensor | None = None) -> Tensor:
        """log ℓ(y|z), shape `(*B,)`; as sbi's estimators, y may have a leading sample dimension.

        `mean` as in `whiten`.
        """
        e = self.whiten(y, z, mean)
        normaliser = 0.5 * e.shape[-1] * math.log(2 * math.pi)
        return -0.5 * (e**2).sum(dim=-1) - normaliser + self.log_det

    def left_out_log_prob(self, y: Tensor, z: Tensor) -> Tensor:
        """log ℓ of the pairs of the fit, each about what the others predict, shape `(N,)`."""
        return self.log_prob(y, z, self.left_out)

    def loss(self, y: Tensor, z: Tensor) -> Tensor:
        """−log ℓ of pairs, shape `(B,)`."""
        return -self.log_prob(y, z)

    def sample(self, sample_shape: torch.Size, z: Tensor) -> Tensor:
        """Draws of y, shape `(*sample_shape, B, dim_y)`."""
        shape = (*sample_shape, len(z), len(self.cholesky))
        return self.colour(torch.randn(shape).to(self.cholesky), z)


class KernelRegression(GaussianRegression):
    """ℓ(y|z) = N(y; m(z), Σ), m a kernel ridge regression: a straight line plus something smooth.

    The kernel is k(z, z') = 10 φ(z)'φ(z') + exp(−|z − z'|² / 2ℓ²D), φ(z) = (1, z), of standardised
    z. ℓ maximises the leave-one-out likelihood, and each output has a ridge of its own, by its
    leave-one-out error; in closed form, from one eigendecomposition per ℓ. Fitted to at most 2,000
    pairs.

    Args:
        dim_z: Dimensions of the condition.
        dim_y: Dimensions of y.
    """

    points: Tensor
    length: Tensor
    shift: Tensor

    def __init__(self, dim_z: int, dim_y: int) -> None:
        super().__init__(dim_z, dim_y, 1)
        self.register_buffer("points", torch.zeros(0, dim_z, dtype=torch.float64))
        self.register_buffer("length", torch.ones((), dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(dim_y, dtype=torch.float64))

    def fit(self, z: Tensor, y: Tensor) -> KernelRegression:
        """Fit to pairs z `(N, dim_z)`, y `(N, dim_y)`, or to 2,000 of them."""
        rows = torch.randperm(len(z))[:_MOST].to(z.device).sort().values
        self.centre, self.scale = z.mean(dim=0), z.std(dim=0).clamp_min(1e-7)
        self.shift, spread = y.double().mean(dim=0), y.double().std(dim=0).clamp_min(1e-12)
        self.points = ((z - self.centre) / self.scale).double()[rows]
        target, best = ((y.double() - self.shift) / spread)[rows], math.inf
        for length in _LENGTHS:
            gram = self._kernel(self.points, torch.tensor(length).to(self.points))
            values, vectors = torch.linalg.eigh(gram)
            values = values.clamp_min(0.0)
            residuals, ridges = _left_out_residuals(values, vectors, target)
            covariance = _shrunk_covariance(residuals)
            if (value := float(torch.logdet(covariance))) < best:
                best = value
                weights = (vectors.T @ target) / (values.unsqueeze(1) + ridges)
                self.coefficients = (vectors @ weights) * spread
                self.length = torch.tensor(length).to(self.points)
                self.cholesky = (torch.linalg.cholesky(covariance) * spread.unsqueeze(1)).to(y)
                left_out = y[rows] - (residuals * spread).to(y)
        self.left_out = self.mean(z)
        self.left_out[rows] = left_out
        return self

    def _kernel(self, points: Tensor, length: Tensor) -> Tensor:
        """k of standardised points `(N, dim_z)` and those of the fit, shape `(N, K)`."""
        inner = points @ self.points.T
        norms = points.pow(2).sum(dim=1, keepdim=True) + self.points.pow(2).sum(dim=1)
        squares = (norms - 2 * inner).clamp_min(0.0)
        smooth = torch.exp(-0.5 * squares / (length**2 * points.shape[1]))
        return smooth + _LINEAR * (1.0 + inner)

    def mean(self, z: Tensor) -> Tensor:
        """m(z), shape `(*B, dim_y)`."""
        points = ((z - self.centre) / self.scale).double()
        parts = points.reshape(-1, points.shape[-1]).split(_ROWS)
        mean = torch.cat([self._kernel(part, self.length) @ self.coefficients for part in parts])
        return (mean + self.shift).reshape(*z.shape[:-1], -1).to(z)


def _left_out_residuals(values: Tensor, vectors: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
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
        left_out = (1.0 - (vectors**2) @ shrink).clamp_min(1e-6)
        fitted = vectors @ (shrink.unsqueeze(1) * projection)
        residuals.append((target - fitted) / left_out.unsqueeze(1))
    stacked = torch.stack(residuals)
    best = stacked.pow(2).mean(dim=1).argmin(dim=0)
    outputs = torch.arange(target.shape[1], device=target.device)
    return stacked[best, :, outputs].T, grid[best]


class AroundRegression(nn.Module):
    """A density estimator of the whitened residuals of a regression, as a density of y.

    Args:
        net: One of sbi's conditional density estimators, of residuals given z.
        regression: Fitted; stays as it is.
    """

    def __init__(self, net: nn.Module, regression: GaussianRegression) -> None:
        super().__init__()
        self.net: Any = net
        self.regression = regression

    def log_prob(self, y: Tensor, z: Tensor) -> Tensor:
        """log ℓ(y|z) for y `(S, B, dim_y)`, z `(B, dim_z)`, shape `(S, B)`."""
        return self.net.log_prob(self.regression.whiten(y, z), z) + self.regression.log_det

    def loss(self, y: Tensor, z: Tensor) -> Tensor:
        """−log ℓ of pairs, shape `(B,)`."""
        return self.net.loss(self.regression.whiten(y, z), z) - self.regression.log_det

    def left_out_loss(self, y: Tensor, z: Tensor, left_out: Tensor) -> Tensor:
        """As `loss`, of pairs that the regression was fitted to: about what the others predict.

        Args:
            y: Shape `(B, dim_y)`.
            z: Shape `(B, dim_z)`.
            left_out: Their rows of the regression's `left_out`, `(B, dim_y)`.
        """
        e = self.regression.whiten(y, z, left_out)
        return self.net.loss(e, z) - self.regression.log_det

    def sample(self, sample_shape: torch.Size, z: Tensor) -> Tensor:
        """Draws of y, shape `(*sample_shape, B, dim_y)`."""
        return self.regression.colour(self.net.sample(sample_shape, z), z)

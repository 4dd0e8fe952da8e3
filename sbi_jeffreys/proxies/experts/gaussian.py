r"""Likelihoods in closed form: y = m(θ) + e, m a ridge polynomial and e Gaussian.

The oldest synthetic likelihood (Wood 2010) is the right one for many simulators with additive
noise, and its fit takes milliseconds. A network may model the whitened residuals in place of y; it
then learns how the simulator *differs* from the regression.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sbi_jeffreys.networks.transforms import scale_of

__all__ = [
    "AroundRegression",
    "GaussianRegression",
    "num_features",
    "shrunk_covariance",
    "standardised",
]

_RIDGE_GRID = torch.logspace(-3, 3, 13, dtype=torch.float64)  # mutant: ridge-off


def num_features(dim: int, degree: int) -> int:
    """Polynomial features in `dim` dimensions up to `degree` (1 or 2), the constant included."""
    return 1 + dim + (dim * (dim + 1) // 2 if degree == 2 else 0)


def shrunk_covariance(residuals: Tensor) -> Tensor:
    """Covariance of residuals `(N, D)` shrunk towards its diagonal; positive definite.

    Correlations are shrunk by oracle approximation (Chen et al. 2010, arXiv 0907.4698, eq. 23).
    """
    num, dim = residuals.shape
    std = residuals.pow(2).mean(dim=0).sqrt().clamp_min(1e-12)
    correlation = (residuals / std).T @ (residuals / std) / num
    squares, ratio = float((correlation**2).sum()), 1.0 - 2.0 / dim
    excess = squares - dim  # how far the correlations are from the identity
    estimate = (ratio * squares + dim**2) / (num + ratio)
    shrinkage = 1.0 if excess <= estimate else estimate / excess  # mutant: no-shrinkage
    eye = torch.eye(dim).to(correlation)
    return ((1 - shrinkage) * correlation + shrinkage * eye) * std * std.unsqueeze(1)


def standardised(y: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Targets `(N, D)` of zero mean and unit variance, times the roots of the weights.

    Returns:
        The targets, the mean and the standard deviation of y, and the roots `(N, 1)` of the
        weights, which are scaled to mean 1.
    """
    y = y.double()
    # mutant: weights-off
    if weights is None:
        weights = torch.ones(len(y)).to(y)
    weights = (weights.to(y) / weights.to(y).mean()).unsqueeze(1)
    shift = (weights * y).mean(dim=0)
    spread = (weights * (y - shift) ** 2).mean(dim=0).sqrt()
    spread = torch.where(spread > 0, spread, 1.0)
    root = weights.clamp_min(1e-12).sqrt()
    return root * (y - shift) / spread, shift, spread, root


class GaussianRegression(nn.Module):
    """ℓ(y|z) = N(y; W'φ(z), Σ), φ the polynomials of standardised z up to `degree`.

    The ridge penalty maximises the leave-one-out likelihood, and Σ is the (shrunk) covariance of
    the leave-one-out residuals, which is wider where the mean is overfitted. `fit` is in closed
    form.

    Args:
        dim_z: Dimensions of the condition.
        dim_y: Dimensions of y.
        degree: 1 or 2.
    """

    centre: Tensor
    scale: Tensor
    coefficients: Tensor
    cholesky: Tensor
    #: The prediction for each pair by the fit to all others, `(N, dim_y)`. In-sample residuals are
    #: smaller than those at new pairs.
    leave_one_out: Tensor

    def __init__(self, dim_z: int, dim_y: int, degree: int) -> None:
        super().__init__()
        self.degree = degree
        self.register_buffer("centre", torch.zeros(dim_z))
        self.register_buffer("scale", torch.ones(dim_z))
        self.register_buffer("coefficients", torch.zeros(num_features(dim_z, degree), dim_y))
        self.register_buffer("cholesky", torch.eye(dim_y))

    def unfitted(self) -> GaussianRegression:
        """A regression of the same kind that is not fitted."""
        return type(self)(len(self.centre), len(self.cholesky), self.degree).to(self.scale)

    def fit(self, z: Tensor, y: Tensor, weights: Tensor | None = None) -> GaussianRegression:
        """Fit to any number of pairs z `(N, dim_z)`, y `(N, dim_y)`.

        With weights `(N,)`, the noise of a pair has the covariance Σ / weight.
        """
        self.centre = z.mean(dim=0)
        self.scale = scale_of(z)
        target, shift, spread, root = standardised(y, weights)
        u, s, vt = torch.linalg.svd(root * self._features(z).double(), full_matrices=False)
        projection, best = u.T @ target, math.inf
        for ridge in _RIDGE_GRID.to(z.device):
            shrink = s**2 / (s**2 + ridge)
            # The residual of each pair under the fit to all others, from the leverages.
            leave_one_out = 1.0 - ((u**2) @ shrink).clamp_max(1.0 - 1e-6)
            # mutant: leave-one-out-off
            residuals = (target - u @ (shrink.unsqueeze(1) * projection)) / leave_one_out[:, None]
            covariance = shrunk_covariance(residuals)
            if (value := float(torch.logdet(covariance))) < best:
                best = value
                self.leave_one_out = (y - residuals / root * spread).to(y)
                solution = vt.T @ ((s / (s**2 + ridge)).unsqueeze(1) * projection) * spread
                solution[0] += shift
                self.coefficients = solution.to(y)
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
            mean: In place of m(z): rows of `leave_one_out` for the pairs of the fit.
        """
        return self._uncorrelated(y - (self.mean(z) if mean is None else mean))

    def _uncorrelated(self, residuals: Tensor) -> Tensor:
        """L⁻¹ times residuals `(*B, dim_y)`."""
        columns = residuals.reshape(-1, residuals.shape[-1]).T  # one solve, not one per pair
        white = torch.linalg.solve_triangular(self.cholesky, columns, upper=False)
        return white.T.reshape(residuals.shape)

    def colour(self, e: Tensor, z: Tensor) -> Tensor:
        """The inverse of `whiten`: y = m(z) + L e."""
        return self.mean(z) + e @ self.cholesky.T

    def log_det(self, z: Tensor) -> Tensor:
        """log |det ∂ whiten / ∂y|, shape `(*B,)`."""
        return -self.cholesky.diagonal().log().sum().expand(z.shape[:-1])

    def whitened(self, y: Tensor, z: Tensor, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `whiten` and `log_det` return, at the cost of one of them."""
        return self.whiten(y, z, mean), self.log_det(z)

    def log_prob(self, y: Tensor, z: Tensor, mean: Tensor | None = None) -> Tensor:
        """log ℓ(y|z), `(*B,)`; y may have a leading sample dimension, as for sbi's estimators.

        `mean` as in `whiten`.
        """
        e, log_det = self.whitened(y, z, mean)
        normaliser = 0.5 * e.shape[-1] * math.log(2 * math.pi)
        return -0.5 * (e**2).sum(dim=-1) - normaliser + log_det

    def leave_one_out_log_prob(self, y: Tensor, z: Tensor) -> Tensor:
        """Leave-one-out log ℓ of the pairs of the fit, shape `(N,)`."""
        return self.log_prob(y, z, self.leave_one_out)

    def loss(self, y: Tensor, z: Tensor) -> Tensor:
        """−log ℓ of pairs, shape `(B,)`."""
        return -self.log_prob(y, z)

    def sample(self, sample_shape: torch.Size, z: Tensor) -> Tensor:
        """Draws of y, shape `(*sample_shape, B, dim_y)`."""
        shape = (*sample_shape, len(z), len(self.cholesky))
        return self.colour(torch.randn(shape).to(self.cholesky), z)


class AroundRegression(nn.Module):
    """A density estimator of the whitened residuals of a regression, as a density of y.

    Args:
        net: One of sbi's conditional density estimators, of residuals given z.
        regression: A fitted regression, which stays as it is.
    """

    def __init__(self, net: nn.Module, regression: GaussianRegression) -> None:
        super().__init__()
        self.net: Any = net
        self.regression = regression

    def log_prob(self, y: Tensor, z: Tensor) -> Tensor:
        """log ℓ(y|z) for y `(S, B, dim_y)`, z `(B, dim_z)`, shape `(S, B)`."""
        e, log_det = self.regression.whitened(y, z)
        return self.net.log_prob(e, z) + log_det

    def loss(self, y: Tensor, z: Tensor) -> Tensor:
        """−log ℓ of pairs, shape `(B,)`."""
        e, log_det = self.regression.whitened(y, z)
        return self.net.loss(e, z) - log_det  # mutant: jacobian-of-the-whitening

    def sample(self, sample_shape: torch.Size, z: Tensor) -> Tensor:
        """Draws of y, shape `(*sample_shape, B, dim_y)`."""
        return self.regression.colour(self.net.sample(sample_shape, z), z)

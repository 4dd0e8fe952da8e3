r"""Likelihoods in closed form with sparse means: each output depends on few features of θ.

With few simulations, a regression on all parameters spends most of its data on coefficients that
are zero. Here each output has features of its own, chosen by orthogonal least squares (forward
selection; Chen, Billings & Luo 1989) and the extended Bayesian information criterion (Chen & Chen
2008), which takes into account among how many features the choice was made:

    EBIC(k) = N log(RSS_k / N) + k log N + 2 log C(F, k).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sbi_jeffreys.networks.transforms import scale_of
from sbi_jeffreys.proxies.experts.gaussian import (
    GaussianRegression,
    shrunk_covariance,
    standardised,
)

__all__ = ["SparseRegression", "cross_validated", "extended_bic", "select_features"]

_FOLDS = 5
_MOST = 30  # features of one output
_PATIENCE = 3  # steps without a lower criterion at any output, after which no more are tried
_DEPENDENT = 1e-6  # least share of a feature's variance that the chosen ones must leave


class SparseRegression(GaussianRegression):
    """ℓ(y|z) = N(y; W'φ(z), Σ), φ polynomials of standardised z, with few of them for each output.

    Σ is the shrunk covariance of cross-validated residuals, with a selection of its own in each
    of five folds: in-sample residuals, and those of leave-one-out fits of the features chosen by
    all pairs, are too small. `leave_one_out` has the predictions of cross-validation.

    Args:
        dim_z: Dimensions of the condition.
        dim_y: Dimensions of y.
        degree: 1 or 2.
    """

    def fit(self, z: Tensor, y: Tensor, weights: Tensor | None = None) -> SparseRegression:
        """Fit to pairs z `(N, dim_z)`, y `(N, dim_y)`.

        With weights `(N,)`, the noise of a pair has the covariance Σ / weight.
        """
        self.centre, self.scale = z.mean(dim=0), scale_of(z)
        target, shift, spread, root = standardised(y, weights)
        features = root * self._features(z).double()

        def predict(rest: Tensor, unseen: Tensor) -> Tensor:
            return features[unseen] @ select_features(features[rest], target[rest])

        residuals = target - cross_validated(predict, len(z))  # mutant: choice-seen-by-all
        solution = select_features(features, target) * spread
        solution[0] += shift
        self.coefficients = solution.to(y)
        self.leave_one_out = (y - residuals / root * spread).to(y)
        factor = torch.linalg.cholesky(shrunk_covariance(residuals))
        self.cholesky = (factor * spread.unsqueeze(1)).to(y)
        return self


def cross_validated(predict: Callable[[Tensor, Tensor], Tensor], num: int) -> Tensor:
    """Predictions for every pair by a fit without its fold.

    Args:
        predict: `predict(rest, unseen)` fits to the pairs at `rest`, and returns predictions
            `(M, *)` for those at `unseen`.
        num: Number of pairs, at least 5.

    Returns:
        Shape `(num, *)`.
    """
    folds = [torch.arange(fold, num, _FOLDS) for fold in range(_FOLDS)]
    parts = [
        predict(torch.cat([*folds[:k], *folds[k + 1 :]]), fold) for k, fold in enumerate(folds)
    ]
    return torch.cat(parts)[torch.cat(folds).argsort()]


def select_features(features: Tensor, target: Tensor) -> Tensor:
    """Least squares on the features that forward selection and EBIC choose for each target.

    Args:
        features: Shape `(N, 1 + F)`; the first one, the constant, is always chosen.
        target: Shape `(N, D)`.

    Returns:
        Coefficients `(1 + F, D)`, zero where a feature is not chosen.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> features = torch.cat([torch.ones(200, 1), torch.randn(200, 20)], dim=1)
        >>> target = features[:, [3]] - 2 * features[:, [7]] + 0.1 * torch.randn(200, 1)
        >>> select_features(features, target).nonzero()[:, 0]
        tensor([0, 3, 7])
    """
    num, num_targets = len(features), target.shape[1]
    most = min(features.shape[1] - 1, _MOST, num // 4)
    outputs = torch.arange(num_targets, device=target.device)
    residuals, left = target.T, features.pow(2).sum(dim=0).expand(num_targets, -1)
    least = _DEPENDENT * left
    basis: list[Tensor] = []  # one unit vector per target, `(D, N)`, for each feature chosen
    chosen, scores = [], []
    for size in range(most + 1):
        gain = (residuals @ features) ** 2 / left.clamp_min(1e-300)
        gain = torch.where(left > least, gain, -1.0)
        best = gain.argmax(dim=1) if size else torch.zeros_like(outputs)
        direction = features.T[best]
        if basis:
            others = torch.stack(basis)
            for _ in range(2):  # twice, because of rounding errors
                along = (direction * others).sum(dim=2, keepdim=True)
                direction = direction - (along * others).sum(dim=0)
        direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-300)
        residuals = residuals - (residuals * direction).sum(dim=1, keepdim=True) * direction
        left = left - (direction @ features) ** 2
        basis.append(direction)
        chosen.append(best)
        rss = residuals.pow(2).sum(dim=1).clamp_min(1e-12 * num)
        penalty = extended_bic(size, features.shape[1] - 1, num)
        scores.append(num * (rss / num).log() + penalty)
        lowest = torch.stack(scores).argmin(dim=0)
        if size - int(lowest.max()) >= _PATIENCE:
            break
    coefficients = torch.zeros(features.shape[1], num_targets).to(target)
    for j, size in enumerate(lowest.tolist()):
        own = torch.stack([best[j] for best in chosen[: size + 1]])
        coefficients[own, j] = torch.linalg.lstsq(features[:, own], target[:, [j]]).solution[:, 0]
    return coefficients


def extended_bic(size: int, num_features: int, num: int) -> float:
    """The penalty k log N + 2 log C(F, k) of k chosen out of F features."""
    choices = math.lgamma(num_features + 1) - math.lgamma(size + 1)
    choices = choices - math.lgamma(num_features - size + 1)
    return size * math.log(num) + 2 * choices  # mutant: choice-among-many-for-free

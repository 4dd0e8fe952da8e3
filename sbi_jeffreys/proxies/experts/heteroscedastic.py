r"""Likelihoods in closed form whose noise depends on θ: y = m(θ) + σ(θ) e, with Gaussian e.

In many simulators a parameter is a noise level, or sets how strongly outputs vary together. A
network needs many simulations to learn that; a regression that chooses few features of θ finds it
from a hundred. In order of the outputs,

    e_j = (y_j − m_j(z)) / σ_j(z) = Σ_{i<j} a_ji(z) e_i + τ_j(z) η_j,

where m_j, log σ_j², log τ_j² and a_ji are linear in features of θ, which the extended BIC chooses
(`proxies.experts.sparse`). The regression of each output on those before it is the modified
Cholesky decomposition of a covariance that depends on θ (Pourahmadi 1999). Scales are fitted by
maximum likelihood, as a gamma regression of squared residuals with a logarithmic link.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sbi_jeffreys.networks.transforms import scale_of
from sbi_jeffreys.proxies.experts.gaussian import (
    GaussianRegression,
    shrunk_covariance,
    standardised,
)
from sbi_jeffreys.proxies.experts.sparse import cross_validated, extended_bic, select_features

__all__ = ["HeteroscedasticRegression", "select_scale"]

_ROUNDS = 2  # rounds in which scale and mean are fitted in turn
_MOST, _PATIENCE = 8, 2  # most features of one scale; steps without a lower criterion
_STEPS, _LONGEST = 10, 2.0  # steps of Fisher scoring; the largest change of a coefficient in one
# mutant: outliers-choose-scales
_OUTLIER = 9.0  # larger squared residuals count as this, in units of their variance
_SMALLEST = 1e-4  # smaller ones count as this, in units of the output's mean squared residual
_NEAR_ZERO = 1e-2  # added to |z| / scale in the logarithm


@dataclass(frozen=True)
class _Parts:
    """Coefficients for standardised outputs; U features used, D outputs, T terms of dependence.

    Attributes:
        used: Which features, `(U,)`.
        mean: Coefficients of m, `(U, D)`.
        scale: Coefficients of log σ², `(U, D)`.
        rest: Coefficients of log τ², `(U, D)`.
        terms: For each term of a_ji e_i, the index i of the earlier output and the index of the
            factor of e_i, which is 1 or a parameter, `(2, T)`.
        dependence: Coefficients of the terms in e_j, `(T, D)`.
        limits: Lowest and highest log σ² of the pairs of the fit, and of log τ², `(4, D)`.
    """

    used: Tensor
    mean: Tensor
    scale: Tensor
    rest: Tensor
    terms: Tensor
    dependence: Tensor
    limits: Tensor

    def log_scales(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """log σ² and log τ², `(*B, D)` each, within the limits: they do not extrapolate."""
        low, high, low_rest, high_rest = self.limits
        scale, rest = features @ self.scale, features @ self.rest
        # mutant: scales-extrapolated
        scale = torch.minimum(torch.maximum(scale, low), high)
        return scale, torch.minimum(torch.maximum(rest, low_rest), high_rest)

    def whiten(self, features: Tensor, simple: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
        """η of residuals y − m(z) `(*B, D)`, and log |det|, `(*B,)`; `simple` has 1 and z."""
        scale, rest = self.log_scales(features)
        e = residuals * (-0.5 * scale).exp()
        earlier, factor = self.terms
        before = (e[..., earlier] * simple[..., factor]) @ self.dependence
        return (e - before) * (-0.5 * rest).exp(), -0.5 * (scale + rest).sum(dim=-1)

    def colour(self, features: Tensor, simple: Tensor, eta: Tensor) -> Tensor:
        """The inverse of `whiten`."""
        scale, rest = self.log_scales(features)
        e = eta * (0.5 * rest).exp()
        earlier, factor = self.terms
        for j in self.dependence.any(dim=0).nonzero()[:, 0].tolist():  # in order of the outputs
            before = (e[..., earlier] * simple[..., factor]) @ self.dependence[:, j]
            e = torch.cat([e[..., :j], (e[..., j] + before).unsqueeze(-1), e[..., j + 1 :]], -1)
        return e * (0.5 * scale).exp()


_NAMES = ("used", "mean", "scale", "rest", "terms", "dependence", "limits")


class HeteroscedasticRegression(GaussianRegression):
    """The model of this module's docstring, with a constant covariance of η.

    Features are polynomials of standardised z, and log |z|, because scales are often proportional
    to a parameter. The covariance of η is the shrunk one of cross-validated residuals, the identity
    where nothing is overfitted. Only features that are used are computed after the fit.

    Args:
        dim_z: Dimensions of the condition.
        dim_y: Dimensions of y.
        degree: 1 or 2.
    """

    shift: Tensor
    spread: Tensor  # of the outputs; the parts are those of standardised outputs
    factors: Tensor  # each feature is a product of two columns of (1, z, log |z|), (2, features)

    def __init__(self, dim_z: int, dim_y: int, degree: int) -> None:
        super().__init__(dim_z, dim_y, degree)
        own, logs = torch.arange(1, 1 + dim_z), torch.arange(1 + dim_z, 1 + 2 * dim_z)
        pairs = [torch.zeros(2, 1).long(), torch.stack([0 * own, own])]
        if degree == 2:
            pairs.append(1 + torch.triu_indices(dim_z, dim_z))
        self.register_buffer("factors", torch.cat([*pairs, torch.stack([0 * logs, logs])], dim=1))
        self.register_buffer("shift", torch.zeros(dim_y))
        self.register_buffer("spread", torch.ones(dim_y))
        for name in _NAMES:
            self.register_buffer(f"part_{name}", torch.zeros(0))

    def fit(self, z: Tensor, y: Tensor, weights: Tensor | None = None) -> HeteroscedasticRegression:
        """Fit to pairs z `(N, dim_z)`, y `(N, dim_y)`.

        Raises:
            ValueError: If there are weights: this model has its own.
        """
        if weights is not None:
            raise ValueError("weights must be None, because this model has weights of its own.")
        self.centre, self.scale = z.mean(dim=0), scale_of(z)
        target, shift, spread, _ = standardised(y, None)
        features, simple = (part.double() for part in self._inputs(z))

        def predict(rest: Tensor, unseen: Tensor) -> Tensor:
            parts = _fit_parts(features[rest], simple[rest], target[rest])
            own = features[unseen][:, parts.used]
            mean = own @ parts.mean
            eta, _ = parts.whiten(own, simple[unseen], target[unseen] - mean)
            return torch.cat([mean, eta], dim=1)

        means, eta = cross_validated(predict, len(z)).tensor_split(2, dim=1)
        parts = _fit_parts(features, simple, target)
        for name in _NAMES:
            value = getattr(parts, name)
            setattr(self, f"part_{name}", value.to(y) if value.is_floating_point() else value)
        self.factors = self.factors[:, parts.used]
        self.shift, self.spread = shift.to(y), spread.to(y)
        self.leave_one_out = (means * spread + shift).to(y)
        self.cholesky = torch.linalg.cholesky(shrunk_covariance(eta)).to(y)
        return self

    def _inputs(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Features of z `(*B, dim_z)`, after the fit only those used; and 1 with standardised z."""
        simple = torch.cat([torch.ones_like(z[..., :1]), (z - self.centre) / self.scale], dim=-1)
        logs = ((z / self.scale).abs() + _NEAR_ZERO).log()
        columns = torch.cat([simple, logs], dim=-1)
        first, second = self.factors
        return columns[..., first] * columns[..., second], simple

    @property
    def _parts(self) -> _Parts:
        return _Parts(*(getattr(self, f"part_{name}") for name in _NAMES))

    def mean(self, z: Tensor) -> Tensor:
        """m(z), shape `(*B, dim_y)`."""
        return self._inputs(z)[0] @ self._parts.mean * self.spread + self.shift

    def whitened(self, y: Tensor, z: Tensor, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Standard normal residuals and `log_det`; see `GaussianRegression.whiten`."""
        features, simple = self._inputs(z)
        if mean is None:
            mean = features @ self._parts.mean * self.spread + self.shift
        eta, log_det = self._parts.whiten(features, simple, (y - mean) / self.spread)
        return self._uncorrelated(eta), log_det - self._log_constant()

    def whiten(self, y: Tensor, z: Tensor, mean: Tensor | None = None) -> Tensor:
        """Standard normal residuals; see `GaussianRegression.whiten`."""
        return self.whitened(y, z, mean)[0]

    def colour(self, e: Tensor, z: Tensor) -> Tensor:
        """The inverse of `whiten`."""
        residuals = self._parts.colour(*self._inputs(z), e @ self.cholesky.T)
        return self.mean(z) + self.spread * residuals

    def log_det(self, z: Tensor) -> Tensor:
        """log |det ∂ whiten / ∂y|, shape `(*B,)`."""
        scale, rest = self._parts.log_scales(self._inputs(z)[0])
        return -0.5 * (scale + rest).sum(dim=-1) - self._log_constant()

    def _log_constant(self) -> Tensor:
        """Logarithm of the scales of whitening that do not depend on z."""
        return self.cholesky.diagonal().log().sum() + self.spread.log().sum()


def _fit_parts(features: Tensor, simple: Tensor, target: Tensor) -> _Parts:
    """Fit targets `(N, D)` to features `(N, F)` and to 1 with z, `(N, 1 + dim_z)`."""
    mean = select_features(features, target)
    for _ in range(_ROUNDS):
        scale, fitted = _scales(features, target - features @ mean)
        root = (-0.5 * fitted).exp()
        weighted = [
            select_features(own.unsqueeze(1) * features, (own * y).unsqueeze(1))
            for own, y in zip(root.T, target.T)
        ]
        mean = torch.cat(weighted, dim=1)
    e = (target - features @ mean) * root
    terms, dependence = _dependence(e, simple)
    earlier, factor = terms
    before = (e[:, earlier] * simple[:, factor]) @ dependence
    rest, fitted_rest = _scales(features, e - before)
    used = torch.stack([mean, scale, rest]).any(dim=0).any(dim=1).nonzero()[:, 0]
    limits = [limit for values in (fitted, fitted_rest) for limit in values.aminmax(dim=0)]
    return _Parts(used, mean[used], scale[used], rest[used], terms, dependence, torch.stack(limits))


def _dependence(e: Tensor, simple: Tensor) -> tuple[Tensor, Tensor]:
    """Terms `(2, T)` and coefficients `(T, D)` of the regression of each e on those before it."""
    num, num_factors = e.shape[1], simple.shape[1]
    found = torch.zeros(num, num_factors, num).to(e)  # [i, f, j]
    for j in range(1, num):  # mutant: dependence-off
        before = (e[:, :j, None] * simple[:, None]).flatten(1)
        constant = torch.ones_like(e[:, :1])
        own = select_features(torch.cat([constant, before], dim=1), e[:, [j]])[1:, 0]
        found[:j, :, j] = own.reshape(j, num_factors)
    terms = found.any(dim=2).nonzero().T
    return terms, found[terms[0], terms[1]]


def _scales(features: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients `(F, D)` of the log variances of residuals, and the log variances `(N, D)`."""
    squares = residuals**2
    squares = torch.maximum(squares, _SMALLEST * squares.mean(dim=0).clamp_min(1e-12))
    found = torch.stack([select_scale(features, own) for own in squares.T], dim=1)
    return found, features @ found


def select_scale(features: Tensor, squares: Tensor) -> Tensor:
    """Log-linear variance of Gaussian residuals, on features that forward selection chooses.

    In each step the feature of the largest score statistic is added, and all are fitted again by
    Fisher scoring.

    Args:
        features: Shape `(N, 1 + F)`; the first one, the constant, is always chosen.
        squares: Squared residuals, `(N,)`, positive.

    Returns:
        Coefficients of the log variance, `(1 + F,)`, zero where a feature is not chosen.

    Example:
        >>> _ = torch.manual_seed(1)
        >>> features = torch.cat([torch.ones(500, 1), torch.randn(500, 10)], dim=1)
        >>> residuals = torch.randn(500) * (0.5 * features[:, 4]).exp()
        >>> select_scale(features, residuals**2).nonzero()[:, 0]
        tensor([0, 4])
    """
    num, num_features = len(features), features.shape[1] - 1
    chosen, best = [0], features.new_zeros(0)
    own = squares.mean().log().reshape(1)
    lowest, at = math.inf, 0
    for size in range(min(_MOST, num_features, num // 8) + 1):
        if size:
            score = (squares * (-features[:, chosen] @ own).exp()).clamp_max(_OUTLIER) - 1
            basis, _ = torch.linalg.qr(features[:, chosen])
            left = features - basis @ (basis.T @ features)
            norms = left.pow(2).sum(dim=0)
            usable = norms > 1e-6 * features.pow(2).sum(dim=0)
            gain = torch.where(usable, (score @ left) ** 2 / norms.clamp_min(1e-300), -1.0)
            gain[chosen] = -1.0
            chosen = [*chosen, int(gain.argmax())]
            own = torch.cat([own, own.new_zeros(1)])
        own, deviance = _fit_scale(features[:, chosen], squares, own)
        criterion = deviance + extended_bic(size, num_features, num)
        if criterion < lowest:
            lowest, at = criterion, size
            best = torch.zeros_like(features[0])
            best[chosen] = own
        elif size - at >= _PATIENCE:
            break
    return best


def _fit_scale(features: Tensor, squares: Tensor, start: Tensor) -> tuple[Tensor, float]:
    """Coefficients by Fisher scoring, and minus twice the log-likelihood up to a constant."""
    inverse = torch.linalg.pinv(features)
    for _ in range(_STEPS):
        ratio = (squares * (-features @ start).exp()).clamp_max(_OUTLIER)
        step = (inverse @ (ratio - 1)).clamp(-_LONGEST, _LONGEST)
        start = start + step
        if float(step.abs().max()) < 1e-4:
            break
    log_variance = features @ start
    ratio = (squares * (-log_variance).exp()).clamp_max(_OUTLIER)
    return start, float((log_variance + ratio).sum())

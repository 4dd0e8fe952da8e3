r"""Noise that is not Gaussian: the residuals of a regression as a mixture of Gaussians.

ℓ(y|z) = Σ_c π_c N(e; μ_c, Σ_c) |∂e/∂y|,  e = L⁻¹(y − m(z)).

This is the right model for outliers, two noise levels, or a skewed or curved cloud about the mean,
where the noise has the same law for every θ. The mixture is sklearn's, and BIC chooses its size:
sizes are tried from small to large while BIC falls, since with many outputs the large ones take
long. The mean is then fitted again, with each pair weighted by the precision of its noise under the
mixture, so that outliers hardly influence it (expectation–conditional maximisation; Meng & Rubin
1993).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn

from sbi_jeffreys.proxies.experts.gaussian import AroundRegression, GaussianRegression
from sbi_jeffreys.proxies.experts.heteroscedastic import HeteroscedasticRegression

__all__ = ["NoiseMixture", "fit_noise"]

_SIZES = (2, 4, 8)  # components tried, beside one
_REFITS = 2  # most refits of the mean
_PARTS = "log_weights", "means", "precision_factors"
_FLOOR = 1e-4  # added to each component's variances; those of e are about 1


class NoiseMixture(nn.Module):
    """A Gaussian mixture of whitened residuals e, or N(0, I) where BIC prefers that.

    Has the interface of sbi's conditional density estimators and ignores the condition.

    Args:
        residuals: e, shape `(N, D)`.
    """

    log_weights: Tensor
    means: Tensor
    precision_factors: Tensor  # F_c with F_c F_c' = Σ_c⁻¹

    def __init__(self, residuals: Tensor) -> None:
        super().__init__()
        dim, values = residuals.shape[1], residuals.double()
        for name, part in zip(_PARTS, (torch.zeros(1), torch.zeros(1, dim), torch.eye(dim)[None])):
            self.register_buffer(name, part.to(values))
        # A single Gaussian has the mean and covariance of the whitening; BIC counts these.
        parameters = dim + dim * (dim + 1) // 2
        best = 2 * float(self.loss(values, values).sum()) + parameters * math.log(len(values))
        for fit in _mixtures(values):
            score = float(fit.bic(values.cpu().numpy()))
            # A score that is NaN ends the search, too.
            if not score < best:  # mutant: mixture-of-one, hopeless-mixtures-fitted
                break
            best = score
            found = fit.weights_, fit.means_, fit.precisions_cholesky_
            self.log_weights, self.means, self.precision_factors = (
                torch.as_tensor(part).to(values) for part in found
            )
            self.log_weights = self.log_weights.log()
        self.to(residuals)

    def _log_joint(self, e: Tensor) -> Tensor:
        """log π_c N(e; μ_c, Σ_c), shape `(*B, components)`."""
        white = torch.einsum(
            "...cd,cde->...ce", e.unsqueeze(-2) - self.means, self.precision_factors
        )
        log_det = self.precision_factors.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        normaliser = 0.5 * e.shape[-1] * math.log(2 * math.pi)
        return self.log_weights + log_det - 0.5 * (white**2).sum(dim=-1) - normaliser

    def log_prob(self, e: Tensor, z: Tensor) -> Tensor:
        """log density of residuals `(*B, D)`, shape `(*B,)`."""
        return torch.logsumexp(self._log_joint(e), dim=-1)

    def loss(self, e: Tensor, z: Tensor) -> Tensor:
        """Minus the log density, shape `(B,)`."""
        return -self.log_prob(e, z)

    def sample(self, sample_shape: torch.Size, z: Tensor) -> Tensor:
        """Draws of e, shape `(*sample_shape, B, D)`, B the rows of z."""
        shape = (*sample_shape, len(z))
        which = torch.multinomial(self.log_weights.exp(), math.prod(shape), replacement=True)
        white = torch.randn(len(which), self.means.shape[1]).to(self.means)
        # e = μ + F'⁻¹ε has covariance (F F')⁻¹ = Σ.
        factors = self.precision_factors[which].transpose(1, 2)
        e = torch.linalg.solve_triangular(factors, white.unsqueeze(-1), upper=False).squeeze(-1)
        return (self.means[which] + e).reshape(*shape, -1)

    def pull(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """The precision of each residual and its centre under the mixture, for a new fit of m.

        With responsibilities r_c and precisions p_c = tr(Σ_c⁻¹)/D, the log density's quadratic
        bound about e is −½ w |e − c|², w = Σ r_c p_c and c = Σ r_c p_c μ_c / w.

        Args:
            e: Shape `(N, D)`.

        Returns:
            w `(N,)` and c `(N, D)`.
        """
        responsibility = torch.softmax(self._log_joint(e), dim=-1)
        precision = self.precision_factors.pow(2).sum(dim=(1, 2)) / e.shape[-1]
        weighted = responsibility * precision
        weights = weighted.sum(dim=-1)
        return weights, weighted @ self.means / weights.unsqueeze(-1)


def _mixtures(residuals: Tensor) -> Iterator[GaussianMixture]:
    """Mixtures of every size that the residuals `(N, D)` suffice for; none if not finite.

    Each is fitted when it is asked for.
    """
    num, dim = residuals.shape
    if not bool(torch.isfinite(residuals).all()):
        return
    values = residuals.cpu().numpy()
    for size in (s for s in _SIZES if s * (dim + 1) < num // 2):
        seed = int(torch.randint(2**31 - 1, ()))  # torch's generator, so that one seed suffices
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fit = GaussianMixture(size, reg_covar=_FLOOR, random_state=seed).fit(values)
        yield fit


def fit_noise(
    regression: GaussianRegression, z: Tensor, y: Tensor
) -> AroundRegression | GaussianRegression:
    """The regression with a mixture for its noise, its mean fitted again under that noise.

    Residuals are those of leave-one-out fits, so that an overfitted mean widens the noise.

    Args:
        regression: A regression fitted to these pairs, which stays as it is.
        z: Shape `(N, dim_z)`.
        y: Shape `(N, dim_y)`.

    Returns:
        The last of at most three fits with a better leave-one-out likelihood than the one before;
        the regression itself where one component is enough.
    """
    best, value, e = _with_noise(regression, z, y)
    if len(best.net.means) == 1:  # mutant: one-component-is-a-mixture
        return regression
    if isinstance(regression, HeteroscedasticRegression):  # this model has weights of its own
        return best
    for _ in range(_REFITS):
        if len(best.net.means) == 1:  # the mean of a Gaussian is that of least squares
            break
        weights, centre = best.net.pull(e)
        target = y - centre @ best.regression.cholesky.T
        # mutant: outliers-keep-their-influence
        again = best.regression.unfitted().fit(z, target, weights)
        fitted, leave_one_out, e = _with_noise(again, z, y)
        if not leave_one_out > value:  # mutant: mean-not-fitted-again, worse-second-fit-taken
            break
        best, value = fitted, leave_one_out
    return best


def _with_noise(
    regression: GaussianRegression, z: Tensor, y: Tensor
) -> tuple[AroundRegression, float, Tensor]:
    """A regression with the mixture of its leave-one-out residuals.

    Returns:
        The regression with its mixture, the mean leave-one-out log density, and the whitened
        residuals `(N, dim_y)`.
    """
    e = regression.whiten(y, z, regression.leave_one_out)
    net = NoiseMixture(e)
    value = float((net.log_prob(e, z) + regression.log_det(z)).mean())
    return AroundRegression(net, regression), value, e

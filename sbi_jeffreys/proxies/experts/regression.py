"""Regression experts: likelihoods about a smooth function of θ, fitted in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sbi_jeffreys._checks import check_bool
from sbi_jeffreys.networks.transforms import MarginalTransform
from sbi_jeffreys.proxies.experts.base import Expert, ExpertData, FittedExpert
from sbi_jeffreys.proxies.experts.gaussian import (
    GaussianRegression,
    num_features,
)
from sbi_jeffreys.proxies.experts.heteroscedastic import HeteroscedasticRegression
from sbi_jeffreys.proxies.experts.kernel import KernelRegression
from sbi_jeffreys.proxies.experts.noise import fit_noise
from sbi_jeffreys.proxies.experts.sparse import SparseRegression

__all__ = ["CLEARLY", "RegressionExpert", "best_regression", "paired_gain"]

CLEARLY = 2.0  # standard errors of the paired difference
_MOST_TERMS = 500  # most terms of a polynomial from which a few are chosen
_FEWEST_PAIRS = 10  # fewest training pairs by which they are chosen


@dataclass(frozen=True)
class RegressionExpert(Expert):
    """A likelihood with additive noise about a smooth function of θ, fitted in closed form.

    Attributes:
        degree: 1 (linear) or 2 (with squares and products). A quadratic is not fitted if it has
            more features than half the number of training pairs, unless `sparse`.
        kernel: Whether a kernel regression is added to the line (degree 1).
        sparse: Whether each output depends on few of the polynomial's terms, which the extended BIC
            chooses out of up to 500, whatever the number of pairs.
        heteroscedastic: Whether, in addition, scales of the noise and its correlations depend on θ.
        mixture: Whether the noise is a mixture of Gaussians, with as many components as BIC
            chooses, instead of one Gaussian.

    Raises:
        TypeError: If `kernel`, `mixture`, `sparse` or `heteroscedastic` is no bool.
        ValueError: If the degree is neither 1 nor 2, if `kernel` is combined with degree 2 or with
            `sparse`, or if `heteroscedastic` is set without `sparse`.
    """

    degree: int = 2
    kernel: bool = False
    mixture: bool = False
    sparse: bool = False
    heteroscedastic: bool = False
    closed_form: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The expert's name in reports: its mean, and its noise where that is not Gaussian."""
        mean = "kernel" if self.kernel else ("linear", "quadratic")[self.degree - 1]
        if self.sparse:
            mean = f"{'heteroscedastic' if self.heteroscedastic else 'sparse'} {mean}"
        return f"{mean} with mixture noise" if self.mixture else mean

    @property
    def averaged(self) -> bool:
        """Only where features are chosen, since the choice differs between parts of the data."""
        return self.sparse  # mutant: chosen-features-of-one-fit

    def __post_init__(self) -> None:
        if type(self.degree) is not int or self.degree not in (1, 2):
            raise ValueError(
                f"degree must be 1 or 2, got {self.degree!r}; pass 1 for a line, 2 for a quadratic."
            )
        for name in ("kernel", "mixture", "sparse", "heteroscedastic"):
            check_bool(name, getattr(self, name))
        if self.kernel and self.degree != 1:
            raise ValueError(
                f"kernel=True goes with degree=1, got degree={self.degree}; pass degree=1."
            )
        if self.kernel and self.sparse:
            raise ValueError("kernel=True and sparse=True exclude each other; pass one of them.")
        if self.heteroscedastic and not self.sparse:
            raise ValueError("heteroscedastic=True goes with sparse=True; pass sparse=True, too.")

    def suits(self, data: ExpertData) -> bool:
        """Whether the degree is one that the training pairs suffice for."""
        if self.sparse:
            enough = len(data.train) >= _FEWEST_PAIRS  # mutant: features-chosen-by-few-pairs
            return enough and num_features(data.z.shape[1], self.degree) <= _MOST_TERMS
        return self.degree <= _max_degree(data.z[data.train])

    def fit(
        self, data: ExpertData, before: Sequence[FittedExpert], abandon_above: float = math.inf
    ) -> FittedExpert:
        """Fit to T(x); see `Expert.fit`. A mixture starts from the fit with Gaussian noise."""
        transform = data.scales[0]
        z, y = data.z[data.train], transform.dequantise(data.x[data.train])
        known = {expert.spec: expert.net for expert in before}
        net = known.get(replace(self, mixture=False))
        if not isinstance(net, GaussianRegression):
            net = self.fit_gaussian(z, y)
        return data.fitted(self, fit_noise(net, z, y) if self.mixture else net, transform)

    def fit_gaussian(self, z: Tensor, y: Tensor) -> GaussianRegression:
        """The regression of y on z with Gaussian noise, fitted to pairs `(N, ·)`."""
        dims = z.shape[1], y.shape[1]
        if self.kernel:
            return KernelRegression(*dims).to(y.device).fit(z, y)
        kind = SparseRegression if self.sparse else GaussianRegression
        if self.heteroscedastic:
            kind = HeteroscedasticRegression
        return kind(*dims, self.degree).to(y.device).fit(z, y)


def _max_degree(z: Tensor) -> int:
    """The degree of the polynomial that training pairs z `(N, D)` suffice for."""
    return 2 if num_features(z.shape[1], 2) <= len(z) // 2 else 1


def paired_gain(ours: Tensor, theirs: Tensor) -> float:
    """Mean of `ours − theirs`, `(M,)` each, in its standard errors; NaN where a fit failed.

    A single pair has no standard error, and the result is NaN, too.
    """
    gain = ours - theirs
    if len(gain) < 2:
        return math.nan
    return float(gain.mean() / gain.std().clamp_min(1e-12) * math.sqrt(len(gain)))


def _complexity(net: GaussianRegression) -> tuple[int, int, bool]:
    """A sort key: the simplest regression is first, and a sparse one before a dense one."""
    rank = (KernelRegression, HeteroscedasticRegression, GaussianRegression)
    kind = next(k for k, known in enumerate(rank) if isinstance(net, known))
    return -kind, net.degree, not isinstance(net, SparseRegression)


def best_regression(
    fitted: Sequence[FittedExpert], transform: MarginalTransform, z: Tensor, x: Tensor
) -> GaussianRegression:
    """The simplest regression of T(x) on z that no other one clearly beats in leave-one-out.

    Candidates are the regressions among the experts fitted so far; where none of them is of T(x),
    two are fitted for the purpose. The simplest is taken because residuals inherit what the mean
    has overfitted.
    """
    own = [expert.net for expert in fitted if expert.transform is transform]
    regressions = [net for net in own if isinstance(net, GaussianRegression)]
    if not regressions:
        specs = (RegressionExpert(_max_degree(z)), RegressionExpert(1, kernel=True))
        regressions = [spec.fit_gaussian(z, transform.dequantise(x)) for spec in specs]
    regressions.sort(key=_complexity)
    y = transform(x)
    with torch.no_grad():
        scores = [net.leave_one_out_log_prob(y, z).nan_to_num(nan=-1e6) for net in regressions]
    best = max(scores, key=lambda score: float(score.mean()))
    # mutant: not-the-simplest-regression
    clearly_beaten = [paired_gain(best, score) > CLEARLY for score in scores]
    return regressions[clearly_beaten.index(False)]  # mutant: another-regression-than-the-best

r"""Temperature of a proxy: the scale of its log factor that held-out pairs support.

A proxy that was fitted too briefly is too wide, and so is the main that is pulled to it. A proxy
that takes many outputs for independent, and errs in their common mean, is too narrow. One number
corrects most of either fault (temperature scaling; Guo et al. 2017, arXiv 1706.04599):

    q_{ψ,γ}(θ|x) ∝ p(θ) e^{γ f_ψ(θ,x)},      γ > 0.

γ has a posterior of its own, given held-out pairs: the product of their ranking likelihood and the
prior log γ ∼ N(0, 0.15²). The partition function cancels in that likelihood, so that it need not be
estimated; the estimate would be the worse the sharper q is. A proxy is sharpened to one standard
deviation below the mean of log γ, because the same pairs stopped the proxy's fit and weighed its
members, which makes them optimistic evidence. It is widened to the mean where the mean is more than
two standard deviations below 0. An energy is left alone: its scale was fitted by the same losses.

Training pairs are better evidence, under fits that have not seen them (`proxies.cross_fitting`). γ
is then the mean of its posterior, whether it widens or sharpens the proxy. With few simulations the
proxy is a mixture of such fits to folds. (The mixture is wider than each of them, so this γ is
rather too low than too high.) With up to 3,000 training pairs, such fits are made only to judge the
proxy, where inexpensive experts have most of the weight. They may widen the proxy; whether it is
sharpened is left to the held-out pairs.

The ranks of one pair in a hundred are taken to be chance, as in a contaminated likelihood: in the
Gaussian tails of a proxy, a single pair far out would otherwise set γ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sbi_jeffreys.objective import ranking_nce_losses

__all__ = ["Evidence", "as_evidence", "inverse_temperature"]

_PRIOR_SCALE = 0.15  # mutant: temperature-of-a-few-pairs
_CLEARLY = 2.0  # standard deviations of log γ below 0 from which on the proxy is widened
_OUTLIERS = 0.01  # share of pairs whose rank is left to chance: a single one must not decide
_STEP, _NUM_STEPS = 0.025, 28  # steps of log γ on either side of 0: γ from a half to two


@dataclass(frozen=True)
class Evidence:
    """True θ of M pairs and contrasts, under fits that have not seen the pairs.

    Attributes:
        offset: log p(θ) − log m(θ|x) of the true θ (row 0) and its contrasts θ_k ∼ m(·|x), shape
            `(1 + K, M)`; −∞ for a contrast outside the prior. Zeros where the contrasts follow the
            same proposal as the pairs.
        log_factor: f_ψ of the same, `(1 + K, M)`.
        weights: Weights of the pairs, `(M,)`.
    """

    offset: Tensor
    log_factor: Tensor
    weights: Tensor


def as_evidence(weights: Tensor) -> Tensor:
    """Kernel weights `(M,)`, scaled so that their sum is the effective number of pairs."""
    effective = weights.sum() ** 2 / (weights**2).sum()
    return weights * effective / weights.sum()  # mutant: excluded-pairs-are-evidence


def inverse_temperature(evidence: Sequence[Evidence], optimistic: bool = False) -> float:
    """The inverse temperature at which true θ of unseen pairs stand out among contrasts.

    With v = γ f_ψ(θ, x) + log p(θ) − log m(θ|x), the posterior of log γ is
    ∝ exp(−Σ ranking losses − (log γ)² / (2 · 0.15²)), with the losses of `ranking_nce_losses`. The
    module's docstring explains which value is taken from this posterior.

    Args:
        evidence: Pairs, in one group or several.
        optimistic: Whether the pairs stopped the proxy's fit, or weighed its experts.

    Returns:
        γ in [0.49, 2.02]; 1 if no pair is usable, or optimistic evidence is not clear.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> theta = torch.randn(1, 2000)  # p(θ) = N(0, 1)
        >>> x = theta[0] + torch.randn(2000)  # p(x|θ) = N(θ, 1)
        >>> both = torch.cat([theta, torch.randn(50, 2000)])  # contrasts from the prior: m = p
        >>> too_wide = -(x - both) ** 2 / 3  # two thirds of the log-likelihood
        >>> pairs = Evidence(torch.zeros_like(both), too_wide, torch.ones(2000))
        >>> 1.2 < inverse_temperature([pairs]) < 1.8  # 3/2 is the truth
        True
    """
    device = evidence[0].log_factor.device
    grid = torch.arange(-_NUM_STEPS, _NUM_STEPS + 1, device=device).double() * _STEP
    total = torch.stack([_total(part, grid) for part in evidence]).sum(dim=0)
    if not bool(total.any()):
        return 1.0
    posterior = torch.softmax(-total - grid**2 / (2 * _PRIOR_SCALE**2), dim=0)
    mean = (posterior * grid).sum()
    deviation = (posterior * (grid - mean) ** 2).sum().sqrt()
    # mutant: temperature-sharpens-only
    if not optimistic or mean < -_CLEARLY * deviation:
        return math.exp(float(mean))
    return math.exp(max(0.0, float(mean - deviation)))


def _total(evidence: Evidence, grid: Tensor) -> Tensor:
    """Sum of the ranking losses of usable pairs at each log γ of a grid; zeros without any."""
    losses = torch.stack(
        [_losses(evidence.offset, evidence.log_factor, float(gamma)) for gamma in grid.exp()]
    )  # (grid, M)
    usable = torch.isfinite(losses).all(dim=0)
    return (evidence.weights * losses)[:, usable].double().sum(dim=1)


def _losses(offset: Tensor, log_factor: Tensor, gamma: float) -> Tensor:
    outside = torch.isneginf(offset)  # there the factor may be anything
    value = torch.where(outside, offset, offset + gamma * log_factor)
    losses = ranking_nce_losses(value[0], value[1:])  # mutant: temperature-by-is-normaliser
    # mutant: one-pair-sets-the-temperature
    chance = math.log(_OUTLIERS) - (~outside).sum(dim=0).log()
    return -torch.logaddexp(math.log1p(-_OUTLIERS) - losses, chance)

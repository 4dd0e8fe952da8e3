r"""Temperature of a proxy: the scale of its log factor that held-out pairs support.

A proxy that was fitted too briefly is too wide, and so is the main that is pulled to it. One that
takes many outputs for independent, and errs in their common mean, is too narrow. One number
corrects most of either (temperature scaling; Guo et al. 2017, arXiv 1706.04599):

    q_{ψ,γ}(θ|x) ∝ p(θ) e^{γ f_ψ(θ,x)},      γ > 0.

γ has a posterior of its own, given held-out pairs: their ranking likelihood, in which the partition
function cancels, so that it needs no estimate (which would be the worse the sharper q is), under
log γ ∼ N(0, 0.15²). A proxy is sharpened to one standard deviation below the mean of log γ,
because the same pairs stopped the proxy's fit and weighed its members, which makes them optimistic
evidence. It is widened to the mean where that is more than two standard deviations below 0. An
energy is left alone: it was fitted by these very losses, its scale included.

With few simulations the proxy is fitted to folds of the training pairs (`proxies.folds`), and each
training pair is unseen by one of the fits. Their evidence is added to that of the held-out pairs,
which take no part in such a fit either, so that γ is the mean of its posterior, in both directions.
(The mixture of the fits is wider than each, so that this γ is rather too low than too high.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sbi_jeffreys.objective import ranking_nce_losses

__all__ = ["Evidence", "as_evidence", "inverse_temperature"]

_PRIOR_SCALE = 0.15  # mutant: temperature-of-a-few-pairs
_CLEARLY = 2.0  # standard deviations of log γ below 0 from which on the proxy is widened
_STEP, _NUM_STEPS = 0.025, 28  # of log γ to either side of 0: from a half to two


@dataclass(frozen=True)
class Evidence:
    """True θ of M pairs and contrasts, under fits that have not seen the pairs.

    Attributes:
        offset: As of `inverse_temperature`, `(1 + K, M)`.
        log_factor: f_ψ of each pair's fit, `(1 + K, M)`.
        weights: Of the pairs, `(M,)`.
    """

    offset: Tensor
    log_factor: Tensor
    weights: Tensor


def as_evidence(weights: Tensor) -> Tensor:
    """Kernel weights `(M,)`, in sum the effective number of pairs: so many that are worth one."""
    effective = weights.sum() ** 2 / (weights**2).sum()
    return weights * effective / weights.sum()  # mutant: excluded-pairs-are-evidence


def inverse_temperature(
    offset: Tensor,
    log_factor: Tensor,
    weights: Tensor | None = None,
    cross_fitted: Evidence | None = None,
) -> float:
    """The inverse temperature at which true θ of held-out pairs stand out among contrasts.

    With v = γ f_ψ(θ, x) + log p(θ) − log m(θ|x), the posterior of log γ is
    ∝ exp(−Σ ranking losses − (log γ)² / (2 · 0.15²)), losses as of `ranking_nce_losses`. The
    module's docstring explains which value is taken from it.

    Args:
        offset: log p(θ) − log m(θ|x) of the true θ (row 0) and its contrasts θ_k ∼ m(·|x), shape
            `(1 + K, M)`; −∞ for a contrast outside the prior. Zeros where the contrasts follow the
            same proposal as the pairs.
        log_factor: f_ψ of the same, shape `(1 + K, M)`.
        weights: Of the pairs, `(M,)`; None: all one.
        cross_fitted: Training pairs under the fits to other folds, where the proxy is a mixture of
            these.

    Returns:
        γ in [0.5, 2]; 1 if no pair is usable, or the evidence is not clear.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> theta = torch.randn(1, 2000)  # p(θ) = N(0, 1)
        >>> x = theta[0] + torch.randn(2000)  # p(x|θ) = N(θ, 1)
        >>> both = torch.cat([theta, torch.randn(50, 2000)])  # contrasts from the prior: m = p
        >>> too_wide = -0.25 * (x - both) ** 2  # half of the log-likelihood
        >>> 1.7 < inverse_temperature(torch.zeros_like(both), too_wide) <= 2
        True
    """
    weights = torch.ones_like(log_factor[0]) if weights is None else weights
    grid = torch.arange(-_NUM_STEPS, _NUM_STEPS + 1, device=log_factor.device).double() * _STEP
    total = _total(Evidence(offset, log_factor, weights), grid)
    if cross_fitted is not None:  # mutant: unseen-training-pairs-no-evidence
        total = total + _total(cross_fitted, grid)
    if not bool(total.any()):
        return 1.0
    posterior = torch.softmax(-total - grid**2 / (2 * _PRIOR_SCALE**2), dim=0)
    mean = (posterior * grid).sum()
    deviation = (posterior * (grid - mean) ** 2).sum().sqrt()
    # mutant: temperature-sharpens-only
    if cross_fitted is not None or mean < -_CLEARLY * deviation:
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
    return ranking_nce_losses(value[0], value[1:])  # mutant: temperature-by-is-normaliser

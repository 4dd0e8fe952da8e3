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
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sbi_jeffreys.objective import ranking_nce_losses

__all__ = ["inverse_temperature"]

_PRIOR_SCALE = 0.15  # mutant: temperature-of-a-few-pairs
_CLEARLY = 2.0  # standard deviations of log γ below 0 from which on the proxy is widened
_STEP, _NUM_STEPS = 0.025, 28  # of log γ to either side of 0: from a half to two


def inverse_temperature(offset: Tensor, log_factor: Tensor, weights: Tensor | None = None) -> float:
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
    grid = torch.arange(-_NUM_STEPS, _NUM_STEPS + 1, device=log_factor.device) * _STEP
    losses = torch.stack(
        [_losses(offset, log_factor, float(gamma)) for gamma in grid.exp()]
    )  # (grid, M)
    usable = torch.isfinite(losses).all(dim=0)
    if not bool(usable.any()):
        return 1.0
    grid = grid.double()
    total = (weights * losses)[:, usable].double().sum(dim=1)
    posterior = torch.softmax(-total - grid**2 / (2 * _PRIOR_SCALE**2), dim=0)
    mean = (posterior * grid).sum()
    deviation = (posterior * (grid - mean) ** 2).sum().sqrt()
    if mean < -_CLEARLY * deviation:  # mutant: temperature-sharpens-only
        return math.exp(float(mean))
    return math.exp(max(0.0, float(mean - deviation)))


def _losses(offset: Tensor, log_factor: Tensor, gamma: float) -> Tensor:
    outside = torch.isneginf(offset)  # there the factor may be anything
    value = torch.where(outside, offset, offset + gamma * log_factor)
    return ranking_nce_losses(value[0], value[1:])  # mutant: temperature-by-is-normaliser

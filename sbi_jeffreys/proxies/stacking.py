"""Weights of densities in a mixture, and powers in a log-linear pool, from unseen pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from sbi_jeffreys.objective import ranking_nce_losses

__all__ = ["pooling_powers", "stacking_weights"]

# Mean and scale of each power's prior: the factors count equally, unless the pairs say otherwise.
_POWER, _POWER_SCALE = 0.5, 0.3


def stacking_weights(log_likelihoods: Tensor, num_iterations: int = 200) -> Tensor:
    """Mixture weights that maximise the held-out likelihood of the mixture, by EM.

    One pseudo-observation spread evenly over the experts keeps the weights off the boundary when
    held-out pairs are few. An expert whose likelihood is not finite somewhere gets weight zero.

    Args:
        log_likelihoods: log ℓ_k(x_n|θ_n) on held-out pairs, shape `(experts, N)`.
        num_iterations: EM steps; the problem is concave, so they converge to the optimum.

    Returns:
        Weights on the simplex, shape `(experts,)`.

    Raises:
        RuntimeError: If no expert is finite on all held-out pairs.
    """
    usable = torch.isfinite(log_likelihoods).all(dim=1)
    if not bool(usable.any()):
        raise RuntimeError(
            "No expert of the likelihood proxy has a finite held-out likelihood. Look for "
            "outliers or near-constant dimensions in x, or lower the proxy's learning rate."
        )
    log_lik = log_likelihoods[usable].double()
    num_experts, num = log_lik.shape
    weights = torch.full((num_experts,), 1.0 / num_experts).to(log_lik)
    for _ in range(num_iterations):
        responsibility = torch.softmax(log_lik + weights.log().unsqueeze(1), dim=0)
        weights = (responsibility.sum(dim=1) + 1.0 / num_experts) / (num + 1.0)
    out = torch.zeros(len(usable)).to(log_likelihoods)
    out[usable] = weights.to(out)
    return out


def pooling_powers(log_factors: Tensor, offset: Tensor) -> Tensor:
    """Powers v of a log-linear pool Σ_j v_j f_j under which true θ stand out among contrasts.

    The mode of the ranking likelihood of `ranking_nce_losses`, which is concave in v, times a
    prior N(1/2, 0.3²) for each power. A factor whose power would be negative gets power 0, and
    the other powers are found without it.

    Args:
        log_factors: f_j of the true θ of M pairs (row 0) and of K contrasts, `(J, 1 + K, M)`.
        offset: log p(θ) − log m(θ|x) of the same, `(1 + K, M)`; −∞ for a contrast outside the
            prior.

    Returns:
        Shape `(J,)`; 1/2 each where no pair is usable.
    """
    factors, offset = log_factors.double(), offset.double()
    outside = torch.isneginf(offset)
    usable = (torch.isfinite(factors) | outside).all(dim=0).all(dim=0)
    usable &= (torch.isfinite(offset) | outside).all(dim=0) & torch.isfinite(offset[0])
    factors = torch.where(outside, 0.0, factors)[..., usable]
    offset = offset[:, usable]
    kept = torch.ones(len(factors), dtype=torch.bool, device=factors.device)
    powers = _mode(factors, offset)
    while bool((powers < 0).any()):  # mutant: negative-powers-cut-off
        kept[kept.clone()] = powers >= 0
        powers = _mode(factors[kept], offset)
    found = torch.zeros(len(factors)).to(log_factors)
    found[kept] = powers.to(found)
    return found


def _mode(factors: Tensor, offset: Tensor) -> Tensor:
    """The powers `(J,)` of `pooling_powers`, of either sign."""
    powers = torch.full((len(factors),), _POWER).to(factors).requires_grad_()
    optimizer = torch.optim.LBFGS([powers], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = offset + torch.einsum("j,jkm->km", powers, factors)
        total = ranking_nce_losses(value[0], value[1:]).sum()
        # mutant: powers-without-prior
        total = total + ((powers - _POWER) ** 2).sum() / (2 * _POWER_SCALE**2)
        total.backward()
        return total

    if len(factors):
        with torch.enable_grad():
            optimizer.step(loss)  # type: ignore[arg-type]  # torch types the loss as a float
    return powers.detach()

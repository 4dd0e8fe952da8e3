"""Weights of a mixture of densities by their log densities at pairs that they have not seen."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["stacking_weights"]


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
            "No likelihood net of the proxy gave finite held-out likelihoods. Look for outliers or "
            "near-constant dimensions in x, or lower the proxy's learning rate."
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

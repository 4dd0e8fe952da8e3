r"""The three divergences and the estimators of their gradients: tensors in, tensors out.

Notation (Ben-Dov & Chamon, *Adaptive Symmetrization of the KL Divergence*, arXiv 2511.11159):
π(θ, x) = p(θ) p(x|θ) is the simulator's joint, p_φ(θ|x) the main model, and
q_ψ(θ|x) = q̃_ψ(θ, x) / Z_ψ(x) the proxy, known up to its partition function Z_ψ(x). The Jeffreys
divergence D_J = E_x[KL(π‖p_φ) + KL(p_φ‖π)] needs π's density in its second half; the proxy stands
in for it:

    F = E_π[−log p_φ(θ|x)]                                forward term,  KL(π‖p_φ) = F − H
    R = E_x E_{θ∼p_φ(·|x)}[log p_φ(θ|x) − log q_ψ(θ|x)]   reverse term,  through the proxy
    P = E_π[−log q_ψ(θ|x)]                                proxy's fit,   KL(π‖q_ψ) = P − H

with H = E_π[−log π(θ|x)] the unknown conditional entropy. Samples of θ come first: tensors of
log densities have shape `(K, B)`, K samples of θ for each of B observations x.

The log ratio f = log p_φ − log q̃_ψ equals log p_φ/q_ψ − log Z_ψ(x): its *mean* over θ carries
the unknown Z_ψ(x), its *variance* over θ does not, and vanishes exactly where p_φ = q_ψ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "effective_sample_size",
    "forward_term",
    "log_normaliser",
    "proxy_fit",
    "ranking_nce_losses",
    "reverse_term",
    "reverse_vargrad_loss",
    "reweighted_forward_term",
    "robust_log_ratio",
    "truncated_log_weights",
    "with_contrasts",
]

_MAX_CONTRASTS = 50


def forward_term(log_p: Tensor, weights: Tensor | None = None) -> Tensor:
    """Forward term F = E_π[−log p_φ(θ|x)], what NPE minimises.

    Args:
        log_p: log p_φ(θ|x) on pairs from π (or from the proxy's joint), any shape.
        weights: Of the pairs, with mean one, of the same shape. A pair of weight zero may have no
            density. None: ones.

    Returns:
        The mean negative log density, a scalar in nats.
    """
    if weights is None:
        return -log_p.mean()
    # mutant: excluded-pairs-count
    return -torch.where(weights > 0, weights * log_p, 0.0).mean()


def reweighted_forward_term(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Forward term on the proxy, E_x E_{q_ψ(θ|x)}[−log p_φ(θ|x)], from the main's own samples.

    The samples θ_k ∼ p_φ(·|x) are reweighted by self-normalised w_k ∝ q̃_ψ/p_φ, detached (the wake
    phase of reweighted wake-sleep; Bornschein & Bengio 2015, arXiv 1406.2751). Needs a proxy that
    can be evaluated, not one that can be sampled.

    Args:
        log_p: log p_φ(θ_k|x) with gradient at detached samples, shape `(K, B)`.
        log_q: log q̃_ψ(θ_k, x), shape `(K, B)`; −∞ outside the prior.

    Returns:
        Scalar in nats. Observations whose every sample is outside contribute nothing.
    """
    log_weights = truncated_log_weights((log_q - log_p).detach())
    weights = log_weights.exp()  # all zero where no sample is inside
    return -(weights * log_p).sum(dim=0).mean()  # mutant: g-reweighted-off


def log_normaliser(log_q: Tensor, log_m: Tensor) -> Tensor:
    """Importance-sampled log partition function of the proxy.

    log Ẑ_ψ(x) = log-mean-exp_k [log q̃_ψ(θ_k, x) − log m(θ_k|x)] with θ_k ∼ m(·|x). Where no
    sample has mass under q̃ the estimate is −∞.

    Args:
        log_q: log q̃_ψ(θ_k, x), shape `(K, B)`; −∞ outside the prior.
        log_m: log density of the sampling distribution m, shape `(K, B)`.

    Returns:
        log Ẑ, shape `(B,)`.
    """
    return torch.logsumexp(log_q - log_m, dim=0) - math.log(log_q.shape[0])


def proxy_fit(log_q: Tensor, log_z: Tensor) -> Tensor:
    """Proxy's fit P = E_π[−log q̃_ψ(θ, x) + log Z_ψ(x)].

    Args:
        log_q: log q̃_ψ(θ, x) on pairs from π, shape `(B,)`.
        log_z: log Z_ψ(x) of the same observations, shape `(B,)`.

    Returns:
        A scalar in nats.
    """
    return (log_z - log_q).mean()  # mutant: p-not-normalised


def robust_log_ratio(log_p: Tensor, log_q: Tensor, barrier: float = 10.0) -> Tensor:
    """Log ratio f = log p_φ − log q̃_ψ, kept within `barrier` of its typical value per x.

    Outside the prior log q̃ = −∞, and one such sample (or one far in a tail of q̃) would decide the
    whole batch. So would one sample that lies where q̃ has mass while the others of its x are far
    from there. Such samples are assigned the *value* f̄(x) ± barrier, f̄(x) being the median over
    the K samples with finite ratio, while the *gradient* of log p_φ still flows: they move mass
    with a bounded force. Where no sample of an x is inside, f̄ is the batch's median, so that
    leakage is still penalised.

    Args:
        log_p: log p_φ(θ_k|x), shape `(K, B)`.
        log_q: log q̃_ψ(θ_k, x), shape `(K, B)`; −∞ or NaN where the proxy has no mass.
        barrier: Largest distance from the typical log ratio in nats, positive.

    Returns:
        The bounded log ratio, shape `(K, B)`, finite wherever `log_p` is.
    """
    if barrier <= 0:
        raise ValueError(
            f"barrier must be positive (nats from the typical log ratio), got {barrier}."
        )
    with torch.no_grad():
        ratio = log_p - log_q
        finite = torch.isfinite(ratio)
        ratio = torch.where(finite, ratio, torch.nan)
        centre = ratio.nanmedian(dim=0).values
        overall = ratio.nanmedian().nan_to_num(0.0)
        centre = torch.where(torch.isfinite(centre), centre, overall)
        ratio = torch.where(finite, ratio, torch.inf)
        lowest = centre - barrier  # mutant: barrier-one-sided
        bounded = torch.minimum(torch.maximum(ratio, lowest), centre + barrier)
        bounded_log_q = log_p - bounded
    log_q = torch.where(bounded == ratio, log_q, bounded_log_q)  # mutant: barrier-off
    return log_p - log_q


def reverse_term(log_p: Tensor, log_q: Tensor, log_z: Tensor | float = 0.0) -> Tensor:
    """Reverse term R = E_x E_{p_φ}[log p_φ − log q̃_ψ + log Z_ψ(x)] per observation.

    Args:
        log_p: log p_φ(θ_k|x) at samples θ_k ∼ p_φ(·|x), shape `(K, B)`.
        log_q: log q̃_ψ(θ_k, x), shape `(K, B)`; +∞ results where it is −∞.
        log_z: log Z_ψ(x), shape `(B,)`, or 0 for the value up to that constant.

    Returns:
        KL(p_φ‖q_ψ) per observation, shape `(B,)`.
    """
    return (log_p - log_q).mean(dim=0) + log_z  # mutant: kl-directions-swapped


def reverse_vargrad_loss(log_p: Tensor, log_q: Tensor, barrier: float = 10.0) -> Tensor:
    """Loss whose gradient estimates ∇_φ R: half the variance of the log ratio over θ.

    ½ Var_k[log p_φ(θ_k|x) − log q̃_ψ(θ_k, x)] with *detached* samples θ_k ∼ p_φ(·|x): its gradient
    is E[(f − E f) ∇ log p_φ] = ∇_φ KL(p_φ‖q_ψ), without reparameterisation and without Z_ψ
    (VarGrad; Richter et al. 2020, arXiv 2010.10436). Only φ may carry gradients: the variance's
    gradient on ψ is not that of a divergence.

    Args:
        log_p: log p_φ(θ_k|x) with gradient, shape `(K, B)`, K ≥ 2.
        log_q: log q̃_ψ(θ_k, x), shape `(K, B)`.
        barrier: See `robust_log_ratio`.

    Returns:
        Scalar loss, mean over observations. Its value is not R.
    """
    if log_p.shape[0] < 2:
        raise ValueError(
            f"log_p needs at least two samples of θ per observation for a variance, got shape "
            f"{tuple(log_p.shape)}; use reverse_samples ≥ 2."
        )
    ratio = robust_log_ratio(log_p, log_q.detach(), barrier)  # mutant: vargrad-without-proxy
    return 0.5 * ratio.var(dim=0).mean()


def ranking_nce_losses(log_ratio: Tensor, log_ratio_contrast: Tensor) -> Tensor:
    """Ranking noise-contrastive losses for an energy over θ (Ma & Collins 2018, arXiv 1809.01812).

    With v = log q̃_ψ(θ, x) − log m(θ|x), the loss is −log softmax of the true θ's v among those of K
    contrasts θ_k ∼ m(·|x). It is bounded below by 0 and consistent for q_ψ ∝ π(θ|x) for any m that
    covers it.

    Args:
        log_ratio: v at the true pairs, shape `(B,)`.
        log_ratio_contrast: v at the contrasts, shape `(K, B)`.

    Returns:
        Losses in nats, shape `(B,)`.
    """
    everything = torch.cat([log_ratio.unsqueeze(0), log_ratio_contrast], dim=0)
    return torch.logsumexp(everything, dim=0) - log_ratio  # mutant: contrasts-off


def with_contrasts(theta: Tensor) -> Tensor:
    """Each pair's θ and, as its contrasts, those of up to 50 other pairs.

    Args:
        theta: Shape `(M, D)`.

    Returns:
        Shape `(1 + K, M, D)`, K = min(M − 1, 50); row 0 is θ.
    """
    num = min(len(theta) - 1, _MAX_CONTRASTS)
    return torch.stack([theta.roll(k, dims=0) for k in range(num + 1)])


def truncated_log_weights(log_weights: Tensor) -> Tensor:
    """Truncated importance weights min(w, w̄ √K) (Ionides 2008), normalised to sum to one.

    Args:
        log_weights: log q̃ − log p_φ of K draws, shape `(K,)` or `(K, B)`; −∞ allowed.

    Returns:
        Normalised log weights of the same shape. Where all weights are zero, all are −∞.
    """
    num = log_weights.shape[0]
    log_weights = torch.nan_to_num(log_weights, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    log_mean = torch.logsumexp(log_weights, dim=0, keepdim=True) - math.log(num)
    # mutant: weights-not-truncated
    log_weights = torch.minimum(log_weights, log_mean + 0.5 * math.log(num))
    total = torch.logsumexp(log_weights, dim=0, keepdim=True)
    return torch.where(torch.isfinite(total), log_weights - total, -torch.inf)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Kish's effective sample size (Σ w)² / Σ w² of K draws.

    Args:
        log_weights: Unnormalised log importance weights, shape `(K,)` or `(K, B)`.

    Returns:
        Between 0 (no finite weight) and K, shape `()` or `(B,)`.
    """
    peak = log_weights.amax(dim=0, keepdim=True)
    # Weights are known up to a factor, which may be huge: the difference below would cancel.
    peak = torch.where(torch.isfinite(peak), peak, 0.0)
    log_weights = log_weights - peak  # mutant: sample-size-cancels
    ess = torch.exp(2 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2 * log_weights, 0))
    return torch.nan_to_num(ess, nan=0.0).clamp_max(len(log_weights))

"""How far to correct: the power β of the pool p_φ^{1−β} q_ψ^β with the best held-out score."""

from __future__ import annotations

import torch
from torch import Tensor

from sbi_jeffreys._checks import check_int, check_tensor
from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.networks.embedding import embedded_once
from sbi_jeffreys.objective import ranking_nce_losses, with_contrasts
from sbi_jeffreys.posteriors.candidates import seeded
from sbi_jeffreys.proxies.base import Proxy

__all__ = ["best_power", "log_pool", "log_pool_at", "pooling_power", "power_of_later_rounds"]

_POWERS = torch.linspace(0.05, 1.0, 20)
_ROWS, _MAX_PAIRS = 25, 200  # held-out pairs per network call, and in all


def log_pool(log_p: Tensor, log_q: Tensor, power: float) -> Tensor:
    """log p_φ^{1−β} q̃_ψ^β, unnormalised; −∞ where proxy or, for β < 1, main has no mass.

    Args:
        log_p: log p_φ(θ|x), of any shape.
        log_q: log q̃_ψ(θ, x), of the same shape.
        power: β.
    """
    if power == 1.0:
        return log_q
    outside = torch.isneginf(log_q) | torch.isneginf(log_p)
    # mutant: all-the-way-to-the-proxy
    return torch.where(outside, -torch.inf, log_p + power * (log_q - log_p))


def log_pool_at(
    main: ConditionalDensityEstimator, x: Tensor, power: float, theta: Tensor, log_q: Tensor
) -> Tensor:
    """`log_pool` at θ `(K, B, D)` of observations x whose log q̃ `(K, B)` is known.

    −∞ where main or proxy has no mass.
    """
    if power == 1.0:
        return log_q
    pool = log_pool(main.log_prob(theta, x), log_q, power)
    return pool.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def best_power(log_ratio: Tensor, log_ratio_true: Tensor) -> float:
    """β in (0, 1] at which the log-linear pool p_φ^{1−β} q_ψ^β has the best held-out log score.

    The score Σ_m [β f*_m − log E_{p_φ} e^{β f_m}], f = log q̃_ψ − log p_φ, is concave in β.

    Args:
        log_ratio: f at K draws θ ∼ p_φ(·|x_m), shape `(K, M)`; −∞ outside the prior.
        log_ratio_true: f at the true parameters, shape `(M,)`.

    Returns:
        The best of 0.05, 0.1, …, 1.

    Raises:
        TypeError, ValueError: If an argument is of another type or shape.
    """
    check_tensor("log_ratio", log_ratio, ("K", "M"))
    check_tensor("log_ratio_true", log_ratio_true, (log_ratio.shape[1],))
    means = [
        # mutant: power-without-the-main-s-normaliser
        (beta * log_ratio_true - torch.logsumexp(beta * log_ratio, dim=0)).mean()
        for beta in _POWERS
    ]
    scores = torch.stack(means).nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    return float(_POWERS[int(scores.argmax())])


@torch.no_grad()
def pooling_power(
    main: ConditionalDensityEstimator,
    proxy: Proxy,
    theta: Tensor,
    x: Tensor,
    num_samples: int = 256,
) -> float:
    """`best_power` from up to 200 held-out pairs; the same at every call.

    Args:
        main: The main model p_φ(θ|x).
        proxy: The proxy.
        theta: Parameters drawn from the prior, `(M, D)`.
        x: Simulations `(M, *x_shape)`.
        num_samples: Draws of the main per pair.

    Raises:
        TypeError, ValueError: If an argument is of another type or shape.
    """
    check_tensor("theta", theta, ("M", *main.input_shape))
    check_tensor("x", x, (len(theta), *main.condition_shape))
    check_int("num_samples", num_samples, 1)
    ratios, true_ratios = [], []
    theta, x = theta[:_MAX_PAIRS], x[:_MAX_PAIRS]
    with seeded(0, theta.device):
        for theta_part, x_part in zip(theta.split(_ROWS), x.split(_ROWS)):
            with embedded_once(main, x_part):
                draws = main.sample(torch.Size((num_samples,)), x_part)
                both = torch.cat([draws, theta_part.unsqueeze(0)])
                ratio = proxy.log_potential(both, x_part) - main.log_prob(both, x_part)
            ratios.append(ratio[:-1])
            true_ratios.append(ratio[-1])
    return best_power(torch.cat(ratios, dim=1), torch.cat(true_ratios))


@torch.no_grad()
def power_of_later_rounds(
    main: ConditionalDensityEstimator, proxy: Proxy, theta: Tensor, x: Tensor
) -> float:
    """β by up to 200 held-out pairs of later rounds, whose θ follow proposals.

    Under proposals, the log score is not proper. As in the atomic loss (Greenberg et al. 2019,
    arXiv 1905.07488), each θ is told from those of other pairs by the ratio of the pool's density
    to the prior's.

    Args:
        main: The main model p_φ(θ|x).
        proxy: The proxy.
        theta: Parameters, `(M, D)`, M ≥ 2.
        x: Simulations `(M, *x_shape)`.

    Returns:
        The best of 0.05, 0.1, …, 1.
    """
    theta, x = theta[-_MAX_PAIRS:], x[-_MAX_PAIRS:]
    parts = []
    for theta_part, x_part in zip(with_contrasts(theta).split(_ROWS, dim=1), x.split(_ROWS)):
        with embedded_once(main, x_part):
            log_p = main.log_prob(theta_part, x_part)
        parts.append((log_p, proxy.log_potential(theta_part, x_part), proxy.log_prior(theta_part)))
    log_p, log_q, log_prior = (torch.cat(part, dim=1) for part in zip(*parts))
    ratios = [log_pool(log_p, log_q, float(beta)) - log_prior for beta in _POWERS]
    losses = torch.stack([ranking_nce_losses(ratio[0], ratio[1:]).mean() for ratio in ratios])
    return float(_POWERS[int(losses.nan_to_num(torch.inf).argmin())])

"""Draws and densities of a posterior at held-out pairs, in the same terms for several kinds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from sbi.inference.posteriors import DirectPosterior, EnsemblePosterior
from torch import Tensor
from torch.distributions import Distribution
from tqdm.auto import tqdm

from sbi_jeffreys._checks import check_tensor
from sbi_jeffreys._sbi import NPE, ConditionalDensityEstimator, device_of, network_of, prior_of
from sbi_jeffreys.diagnostics.calibration import PairDraws, inside_prior
from sbi_jeffreys.networks.embedding import embedded_once
from sbi_jeffreys.objective import effective_sample_size, log_normaliser, reverse_term
from sbi_jeffreys.posteriors.corrected import CorrectedPosterior
from sbi_jeffreys.posteriors.focused import FocusedPosterior
from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.proxies.partition import defensive_log_normaliser

__all__ = ["evaluate"]

_DRAWS_AT_ONCE = 20_000  # shared between the pairs of a batch: bounds memory
# The reverse KL varies little between observations, and a proxy is expensive to evaluate.
_MAX_REVERSE_PAIRS = 200


@dataclass(frozen=True)
class _Subject:
    """The density estimators of a posterior, their weights, and what is evaluated with them."""

    mains: Sequence[ConditionalDensityEstimator]
    weights: Tensor
    prior: Distribution
    proxy: Proxy | None
    corrected: CorrectedPosterior | None
    device: torch.device


def evaluate(
    subject: Any,
    theta: Tensor,
    x: Tensor,
    num_samples: int,
    proxy: Proxy | None = None,
    show_progress_bars: bool = False,
) -> tuple[PairDraws, tuple[Tensor, Tensor] | None]:
    """Draw from a posterior and evaluate its density at pairs, batch by batch.

    The arguments, and the errors about them, are those of `held_out_report`. Beside the draws, the
    result has two values for each of the first M ≤ N observations, `(M,)`: the reverse KL to the
    proxy in nats, and the effective sample size in [0, 1] of draws reweighted to the proxy. This
    second part of the result is None without a proxy.
    """
    found = _subject(subject, proxy)
    main = found.mains[0]
    remedy = "pass simulations of the shape that the posterior was trained on"
    check_tensor("theta", theta, ("N", *main.input_shape), remedy=remedy)
    check_tensor("x", x, ("N", *main.condition_shape), remedy=remedy)
    theta, x = theta.to(found.device).float(), x.to(found.device).float()
    size = max(1, _DRAWS_AT_ONCE // num_samples)
    draws: list[PairDraws] = []
    against: list[tuple[Tensor, Tensor]] = []
    starts = range(0, len(theta), size)
    for start in tqdm(starts, desc="Evaluating held-out pairs", disable=not show_progress_bars):
        rows = slice(start, start + size)
        raw = _draw(found, theta[rows], x[rows], num_samples)
        if found.proxy is not None and start < _MAX_REVERSE_PAIRS:
            log_q = found.proxy.log_potential(raw.theta, x[rows])
            log_z, _ = defensive_log_normaliser(found.proxy, main, x[rows], num_samples)
            against.append(_against_proxy(found.prior, raw, log_q, log_z))
        if found.corrected is not None:
            raw = _reweighted(found.corrected, raw, theta[rows], x[rows])
        draws.append(raw)
    weights = [batch.log_weights for batch in draws if batch.log_weights is not None]
    joined = PairDraws(
        torch.cat([batch.theta for batch in draws], dim=1),
        torch.cat([batch.log_prob for batch in draws], dim=1),
        torch.cat([batch.log_prob_true for batch in draws]),
        torch.cat(weights, dim=1) if weights else None,
    )
    reverse, sizes = ([batch[k] for batch in against] for k in range(2))
    return joined, (torch.cat(reverse), torch.cat(sizes)) if against else None


def _subject(given: Any, proxy: Proxy | None) -> _Subject:
    """The parts of a trainer or posterior that are evaluated."""
    weights = torch.ones(1)
    if isinstance(given, NPE):
        network = network_of(given)
        if network is None:
            raise RuntimeError("The inference is not trained yet: call train() first.")
        mains = [network]
    elif isinstance(given, FocusedPosterior):  # mutant: focused-judged-elsewhere
        raise TypeError(
            "inference_or_posterior: got FocusedPosterior, which is a posterior of one "
            "observation; report on the posterior that build_posterior() returns. For the focused "
            "one, see its attribute focus."
        )
    elif isinstance(given, DirectPosterior):
        mains = [given.posterior_estimator]
    elif isinstance(given, EnsemblePosterior):
        _check_members(given)
        if proxy is not None:
            raise ValueError(
                f"proxy must be None for an ensemble, got {type(proxy).__name__}; report on each "
                "of its members instead."
            )
        mains, weights = [part.posterior_estimator for part in given.posteriors], given.weights
    else:
        raise TypeError(
            f"inference_or_posterior: got {type(given).__name__}; pass a trained NPE_Jeffreys or "
            "NPE, or what build_posterior() returns (a DirectPosterior), or an EnsemblePosterior "
            "of those. A density is needed: build with sample_with='direct'."
        )
    proxy = getattr(given, "proxy", None) if proxy is None else proxy
    corrected = given if isinstance(given, CorrectedPosterior) else None
    return _Subject(mains, weights, prior_of(given), proxy, corrected, device_of(given))


def _check_members(ensemble: EnsemblePosterior) -> None:
    """Require members whose draws have the density of their network."""
    for part in ensemble.posteriors:
        if type(part) is not DirectPosterior:
            raise TypeError(
                f"inference_or_posterior: got an EnsemblePosterior with a {type(part).__name__} "
                "among its members; each of them must be what build_posterior() returns. Report on "
                "each of the others by itself."
            )


def _draw(found: _Subject, theta: Tensor, x: Tensor, num_samples: int) -> PairDraws:
    """Raw draws of the main, or of the mixture of mains, with densities of draws and truths."""
    weights, num = found.weights, len(found.mains)
    counts = torch.bincount(torch.multinomial(weights, num_samples, True), minlength=num).tolist()
    with ExitStack() as stack:
        for main in found.mains:
            stack.enter_context(embedded_once(main, x))
        sizes = [(main, torch.Size((count,))) for main, count in zip(found.mains, counts) if count]
        drawn = torch.cat([main.sample(size, x) for main, size in sizes])
        both = torch.cat([drawn, theta.unsqueeze(0)])
        log_probs = torch.stack([main.log_prob(both, x) for main in found.mains])
    log_p = torch.logsumexp(log_probs + weights.to(drawn).log().reshape(-1, 1, 1), dim=0)
    return PairDraws(drawn, log_p[:-1], log_p[-1])


def _against_proxy(
    prior: Distribution, draws: PairDraws, log_q: Tensor, log_z: Tensor
) -> tuple[Tensor, Tensor]:
    """KL(p̄_φ‖q_ψ), with p̄_φ the main truncated to the prior, and the effective sample size."""
    inside = inside_prior(prior, draws.theta) & torch.isfinite(log_q)
    log_share = inside.double().mean(0).log().to(log_q)  # −∞ where nothing is inside
    kept = inside.double().sum(0).to(log_q)
    log_p = torch.where(inside, draws.log_prob - log_share, 0.0)
    # Draws outside count as zeros, hence the division by the share of those inside.
    ratio = reverse_term(log_p, torch.where(inside, log_q, 0.0)) * len(log_q) / kept
    size = effective_sample_size(log_q - draws.log_prob) / len(log_q)
    return ratio + log_z, size


def _reweighted(
    corrected: CorrectedPosterior, raw: PairDraws, theta: Tensor, x: Tensor
) -> PairDraws:
    """The main's draws as the weighted draws of its corrected posterior."""
    target = corrected.log_potential(raw.theta, x, raw.log_prob)
    target_true = corrected.log_potential(theta.unsqueeze(0), x, raw.log_prob_true[None])[0]
    log_weights = target - raw.log_prob
    log_z = log_normaliser(target, raw.log_prob)
    return PairDraws(raw.theta, target - log_z, target_true - log_z, log_weights)

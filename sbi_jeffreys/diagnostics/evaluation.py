"""Reading posteriors of several kinds in the same terms: draws and densities at held-out pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from sbi.inference.posteriors import DirectPosterior, EnsemblePosterior
from torch import Tensor
from torch.distributions import Distribution
from tqdm.auto import tqdm

from sbi_jeffreys._sbi import NPE_C, ConditionalDensityEstimator
from sbi_jeffreys.diagnostics.calibration import PairDraws, inside_prior
from sbi_jeffreys.networks.embedding import embedded_once
from sbi_jeffreys.objective import effective_sample_size, log_normaliser, reverse_term
from sbi_jeffreys.posteriors.corrected import CorrectedPosterior
from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.training.held_out import defensive_log_normaliser

__all__ = ["Reading", "read"]

_DRAWS_AT_ONCE = 20_000  # shared between the pairs of a batch
_MAX_REVERSE_PAIRS = 200  # the reverse KL varies little between observations, and proxies are dear


@dataclass(frozen=True)
class Reading:
    """A posterior at N pairs.

    Attributes:
        prior: The prior it is cut to.
        draws: Its draws and densities.
        reverse: KL to the proxy by observation, in nats, `(M,)` with M ≤ N, or None.
        effective_sample_size: Of the draws reweighted to the proxy, in [0, 1], `(M,)`, or None.
    """

    prior: Distribution
    draws: PairDraws
    reverse: Tensor | None
    effective_sample_size: Tensor | None


@dataclass(frozen=True)
class _Subject:
    """The density estimators behind a posterior, their weights, and what goes with them."""

    mains: Sequence[ConditionalDensityEstimator]
    weights: Tensor
    prior: Distribution
    proxy: Proxy | None
    corrected: CorrectedPosterior | None
    device: torch.device


def read(
    subject: Any,
    theta: Tensor,
    x: Tensor,
    num_samples: int,
    proxy: Proxy | None = None,
    show_progress_bars: bool = False,
) -> Reading:
    """Draws and densities of a posterior at pairs θ `(N, D)`, x `(N, *x_shape)`, batch by batch."""
    found = _subject(subject, proxy)
    _check_shapes(found, theta, x)
    theta, x = theta.to(found.device).float(), x.to(found.device).float()
    size = max(1, _DRAWS_AT_ONCE // num_samples)
    draws: list[PairDraws] = []
    against: list[tuple[Tensor, Tensor]] = []
    starts = tqdm(
        range(0, len(theta), size), desc="Reading held-out pairs", disable=not show_progress_bars
    )
    for start in starts:
        rows = slice(start, start + size)
        raw = _draw(found, theta[rows], x[rows], num_samples)
        if found.proxy is None:
            draws.append(raw)
            continue
        if start < _MAX_REVERSE_PAIRS:
            log_q = found.proxy.log_potential(raw.theta, x[rows])
            log_z, _ = defensive_log_normaliser(found.proxy, found.mains[0], x[rows], num_samples)
            against.append(_against_proxy(found.prior, raw, log_q, log_z))
        if found.corrected is not None:
            raw = _reweighted(found.corrected, raw, theta[rows], x[rows])
        draws.append(raw)
    reverse, sizes = map(torch.cat, zip(*against)) if against else (None, None)
    return Reading(found.prior, _joined(draws), reverse, sizes)


# ------------------------------------------------------------------ what is it?


def _subject(given: Any, proxy: Proxy | None) -> _Subject:
    """Unwrap a trainer or posterior."""
    if isinstance(given, NPE_C):
        if given._neural_net is None:
            raise RuntimeError("The inference is not trained yet: call train() first.")
        mains, prior = [given._neural_net], given._prior
        proxy = getattr(given, "proxy", None) if proxy is None else proxy
    elif isinstance(given, DirectPosterior):
        mains, prior = [given.posterior_estimator], given.prior
        proxy = getattr(given, "proxy", None) if proxy is None else proxy
    elif isinstance(given, EnsemblePosterior) and all(
        type(part) is DirectPosterior for part in given.posteriors
    ):
        mains, prior = [part.posterior_estimator for part in given.posteriors], given.prior
        if proxy is not None:
            raise ValueError("proxy: expected None for an ensemble; report on its members instead.")
    else:
        raise TypeError(
            f"inference_or_posterior: got {type(given).__name__}; pass a trained NPE_Jeffreys or "
            "NPE, or what build_posterior() returns (a DirectPosterior), or an EnsemblePosterior "
            "of those. A density is needed: build with sample_with='direct'."
        )
    weights = given.weights if isinstance(given, EnsemblePosterior) else torch.ones(1)
    corrected = given if isinstance(given, CorrectedPosterior) else None
    return _Subject(mains, weights, prior, proxy, corrected, torch.device(given._device))


def _check_shapes(found: _Subject, theta: Tensor, x: Tensor) -> None:
    """Against what the network was built for."""
    main = found.mains[0]
    for name, values, shape in (
        ("theta", theta, main.input_shape),
        ("x", x, main.condition_shape),
    ):
        if values.shape[1:] != shape:
            raise ValueError(
                f"{name}: expected shape (N, {', '.join(map(str, shape))}) like the simulations "
                f"the posterior was trained on, got {tuple(values.shape)}."
            )


# ------------------------------------------------------------------ draws and densities


def _draw(found: _Subject, theta: Tensor, x: Tensor, num_samples: int) -> PairDraws:
    """Raw draws of the (mixture of) main(s), with densities of draws and truths."""
    counts = torch.bincount(
        torch.multinomial(found.weights, num_samples, replacement=True),
        minlength=len(found.mains),
    )
    parts = [
        _once(main, x, lambda m=main, n=int(n): m.sample(torch.Size((n,)), x))
        for main, n in zip(found.mains, counts)
        if n > 0
    ]
    drawn = torch.cat(parts)
    both = torch.cat([drawn, theta.unsqueeze(0)])
    log_probs = [_once(main, x, lambda m=main: m.log_prob(both, x)) for main in found.mains]
    log_weights = found.weights.to(drawn).log().reshape(-1, 1, 1)
    log_p = torch.logsumexp(torch.stack(log_probs) + log_weights, dim=0)
    return PairDraws(drawn, log_p[:-1], log_p[-1])


def _once(main: ConditionalDensityEstimator, x: Tensor, call: Callable[[], Tensor]) -> Tensor:
    """`call`, with x embedded once."""
    with embedded_once(main, x):
        return call()


def _against_proxy(
    prior: Distribution, draws: PairDraws, log_q: Tensor, log_z: Tensor
) -> tuple[Tensor, Tensor]:
    """KL(p̄_φ‖q_ψ), p̄_φ the main cut to the prior as sbi samples it, and the sample size."""
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
    assert raw.log_prob_true is not None
    target = corrected.log_potential(raw.theta, x, raw.log_prob)
    target_true = corrected.log_potential(theta.unsqueeze(0), x, raw.log_prob_true[None])[0]
    log_weights = target - raw.log_prob
    log_z = log_normaliser(target, raw.log_prob)
    return PairDraws(raw.theta, target - log_z, target_true - log_z, log_weights)


def _joined(batches: Sequence[PairDraws]) -> PairDraws:
    """Batches of pairs, side by side."""
    columns: dict[str, Any] = {}
    for name in (f.name for f in fields(PairDraws) if f.name != "normalised"):
        values = [getattr(batch, name) for batch in batches]
        dim = 0 if name == "log_prob_true" else 1
        columns[name] = None if values[0] is None else torch.cat(values, dim=dim)
    return PairDraws(**columns)

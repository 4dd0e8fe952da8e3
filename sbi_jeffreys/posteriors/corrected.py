r"""Correction at inference: the main's draws, resampled by importance weights (q̃_ψ/p_φ)^β.

The proxy is often closer to the truth than the amortised main that was fitted to it, and at one
observation the proxy can be evaluated as often as needed. Drawing many θ_k ∼ p_φ(·|x_o) and
resampling them by w_k ∝ [q̃_ψ(θ_k, x_o) / p_φ(θ_k|x_o)]^β, truncated at w̄ √K (Ionides 2008), closes
the amortisation gap. The target is the log-linear pool p_φ^{1−β} q_ψ^β (Genest & Zidek 1986): main
and proxy have different errors, and β is chosen by the pool's score on held-out pairs. Only where
few candidates carry the weight are there steps of Markov chains (`posteriors.moves`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from sbi_jeffreys._checks import (
    check_bool,
    check_float,
    check_instance,
    check_int,
    check_observation,
    check_observations,
    check_prior,
    check_rows,
    check_sample_shape,
)
from sbi_jeffreys._sbi import ConditionalDensityEstimator, device_of
from sbi_jeffreys.networks.embedding import check_missing, embedded_once
from sbi_jeffreys.posteriors import candidates
from sbi_jeffreys.posteriors.candidates import Candidates, resample
from sbi_jeffreys.posteriors.direct import AnyPriorPosterior
from sbi_jeffreys.posteriors.importance import ImportanceQuality, warn_if_unreliable
from sbi_jeffreys.posteriors.moves import distinct_draws
from sbi_jeffreys.posteriors.power import log_pool, log_pool_at
from sbi_jeffreys.posteriors.proxy import PooledPotential
from sbi_jeffreys.proxies.base import Proxy

__all__ = ["CorrectedPosterior"]

_BATCH = 10_000  # draws per network call: bounds memory
_THETA_REMEDY = "pass one row per parameter vector, and one column per observation if batched"


class CorrectedPosterior(AnyPriorPosterior):
    """The main's posterior, its draws resampled by truncated importance weights of the proxy.

    Built by `NPE_Jeffreys.build_corrected_posterior`. A `JeffreysWarning` is given where the
    weights are unreliable (see `quality`), because main and proxy disagree there. At a single x,
    `sample` and `log_prob` then weight draws of a proposal that is adapted to the proxy instead;
    where more than a tenth of the draws of `sample` would be copies, Metropolis steps move them.

    The candidates at one x are a function of x and of torch's seed (`torch.initial_seed()`). Those
    of the last few x are kept: samples of several calls at one x share their candidates. For fresh
    candidates, set another seed. After a change of the networks in place, call `clear_cache()`.

    Args:
        main: The main model p_φ(θ|x).
        proxy: The proxy q_ψ whose weights correct it.
        prior: Prior, for sbi's rejection of samples outside it.
        num_candidates: Draws K that are weighted at a single observation; four per sample if more
            samples are asked for. `sample_batched` takes fewer.
        power: β in (0, 1], how far to go from the main (0) to the proxy (1).
        **kwargs: Passed to `DirectPosterior`.

    Raises:
        TypeError, ValueError: If an argument is of another type or out of range, in every method.
    """

    reweighted = True  # its draws do not have the density of its `posterior_estimator`

    def __init__(
        self,
        main: ConditionalDensityEstimator,
        proxy: Proxy,
        prior: Distribution,
        num_candidates: int = 20_000,
        power: float = 1.0,
        **kwargs: Any,
    ) -> None:
        check_instance("main", main, ConditionalDensityEstimator, "pass what train() returned")
        check_instance("proxy", proxy, Proxy, "pass inference.proxy or a GivenProxy")
        check_prior(prior)
        check_int("num_candidates", num_candidates, 1)
        remedy = "1 corrects all the way to the proxy; for the main itself use build_posterior()"
        self.power = float(check_float("power", power, 0.0, 1.0, low_open=True, remedy=remedy))
        super().__init__(posterior_estimator=main, prior=prior, **kwargs)
        # mutant: map-of-the-main
        self.potential_fn = PooledPotential(main, proxy, self.log_potential, str(device_of(self)))
        self.proxy, self.num_candidates = proxy, num_candidates
        self._cache = candidates.CandidateCache()

    def __str__(self) -> str:
        return f"{type(self).__name__}: the main's draws, resampled by weights of the proxy."

    def to(self, device: str | torch.device) -> None:
        """Move main, proxy and prior to a device."""
        self.proxy.to(device)
        potential: Any = self.potential_fn
        super().to(device)  # which puts the main's potential in its place
        self.potential_fn = potential.to(device)
        self.clear_cache()

    def clear_cache(self) -> None:
        """Drop the candidates that are kept; needed after changing main or proxy in place."""
        self._cache.clear()

    def weighted_sample(
        self,
        num_candidates: int,
        x: Tensor | None = None,
        max_sampling_batch_size: int = _BATCH,
        show_progress_bars: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Draws of the main and their log importance weights, unnormalised and not truncated.

        Args:
            num_candidates: K.
            x: One observation; the default x if None.
            max_sampling_batch_size, show_progress_bars: As in sbi, for network calls.

        Returns:
            θ `(K, D)` and β (log q̃_ψ − log p_φ), shape `(K,)`; −∞ outside the prior.
        """
        num, x_o = check_int("num_candidates", num_candidates, 1), self._observation(x)
        found = self._candidates(num, x_o, max_sampling_batch_size, show_progress_bars)
        return found.theta[:, 0].clone(), found.log_weights[:, 0].clone()

    def log_potential(self, theta: Tensor, x: Tensor, log_p: Tensor) -> Tensor:
        """log p_φ^{1−β} q̃_ψ^β, `(K, B)`, up to a constant of x; −∞ outside the prior.

        Args:
            theta: Parameters `(K, B, D)`.
            x: Observations `(B, *x_shape)`.
            log_p: log p_φ(θ|x), shape `(K, B)`.
        """
        return log_pool(log_p, self.proxy.log_potential(theta, x), self.power)

    def quality(
        self, x: Tensor | None = None, num_candidates: int | None = None
    ) -> ImportanceQuality:
        """Effective sample size and Pareto k̂ of the weights at one observation.

        Args:
            x: One observation; the default x if None.
            num_candidates: Draws that both are estimated from; as many as `sample` weights if None.
                Few draws miss the largest weights, and make the estimate too optimistic.
        """
        return self._candidates(num_candidates, self._observation(x)).quality[0]

    def effective_sample_size(
        self, x: Tensor | None = None, num_candidates: int | None = None
    ) -> float:
        """Effective sample size of the weights at x, as a fraction in [0, 1]; see `quality`."""
        return self.quality(x, num_candidates).effective_sample_size

    def sample(
        self,
        sample_shape: Any = torch.Size(),
        x: Tensor | None = None,
        max_sampling_batch_size: int = _BATCH,
        show_progress_bars: bool = True,
    ) -> Tensor:
        """Corrected draws at one observation; warns where they are unreliable.

        Args:
            sample_shape: Shape of the draws; the candidates are at least four times as many (twice
                as many where they come from an adapted proposal).
            x: One observation; the default x if None.
            max_sampling_batch_size: Draws per network call.
            show_progress_bars: Whether to show progress over network calls and steps.

        Returns:
            Shape `(*sample_shape, D)`.

        Raises:
            RuntimeError: If no draw of the main has mass under the proxy.
        """
        shape, x_o = check_sample_shape(sample_shape), self._observation(x)
        how = max_sampling_batch_size, show_progress_bars
        num = candidates.enough(self.num_candidates, shape)
        target = partial(self._log_target, x=x_o)
        found = self._candidates(num, x_o, *how, adapt=True)
        return distinct_draws(found, shape.numel(), target, *how).reshape(*shape, -1)

    def sample_batched(
        self,
        sample_shape: Any,
        x: Tensor,
        max_sampling_batch_size: int = _BATCH,
        show_progress_bars: bool = True,
        num_candidates: int | None = None,
    ) -> Tensor:
        """Corrected draws for each of B observations; warns once about unreliable ones.

        Args:
            sample_shape: Shape of the draws at each observation; copies are not moved.
            x: Observations `(B, *x_shape)`.
            max_sampling_batch_size: Draws per network call, shared by several observations.
            show_progress_bars: Whether to show progress over the observations.
            num_candidates: Draws that are weighted per observation, fewer than in `sample`. None:
                the posterior's own number but at most 2,000, and at least four per sample.

        Returns:
            Shape `(*sample_shape, B, D)`.

        Raises:
            RuntimeError: If at some observation no draw of the main has mass under the proxy.
        """
        shape = check_sample_shape(sample_shape)
        if num_candidates is None:
            num_candidates = candidates.enough(self.num_candidates, shape, batched=True)
        draws, qualities, x = [], [], self._observations(x)
        chunks = self._chunks(num_candidates, x, max_sampling_batch_size, show_progress_bars)
        for _, found in chunks:
            draws.append(resample(found, shape.numel()))
            qualities += found.quality
        warn_if_unreliable(qualities)
        return torch.cat(draws, dim=1).reshape(*shape, len(x), -1)

    def log_prob(
        self,
        theta: Tensor,
        x: Tensor | None = None,
        norm_posterior: bool = True,
        track_gradients: bool = False,
        num_candidates: int | None = None,
    ) -> Tensor:
        """Log density of the target p_φ^{1−β} q_ψ^β at one observation.

        Args:
            theta: Parameters, shape `(N, D)`.
            x: One observation; the default x if None.
            norm_posterior: Whether to normalise by importance sampling; warns if it is unreliable.
            track_gradients: Whether gradients flow to θ.
            num_candidates: Draws for the normaliser; as many as `sample` weights if None.

        Returns:
            Shape `(N,)`, −∞ outside the prior.
        """
        x_o, shape = self._observation(x), self.posterior_estimator.input_shape
        theta = check_rows("theta", theta, ("N", *shape), remedy=_THETA_REMEDY).unsqueeze(1)
        log_target = self._log_target(theta, x_o, track_gradients)[:, 0]
        if not check_bool("norm_posterior", norm_posterior):
            return log_target
        return log_target - self._candidates(num_candidates, x_o, adapt=True).log_normaliser

    def log_prob_batched(
        self,
        theta: Tensor,
        x: Tensor,
        norm_posterior: bool = True,
        track_gradients: bool = False,
        num_candidates: int | None = None,
    ) -> Tensor:
        """As `log_prob`, of θ `(N, B, D)` or `(B, D)` at x `(B, *x_shape)`; shape `(N, B)`."""
        x, shape = self._observations(x), self.posterior_estimator.input_shape
        theta = check_rows("theta", theta, ("N", len(x), *shape), remedy=_THETA_REMEDY)
        if not check_bool("norm_posterior", norm_posterior):
            return self._log_target(theta, x, track_gradients)
        columns, qualities = [], []
        for rows, found in self._chunks(num_candidates, x):
            log_target = self._log_target(theta[:, rows], x[rows], track_gradients)
            columns.append(log_target - found.log_normaliser)
            qualities += found.quality
        warn_if_unreliable(qualities)
        return torch.cat(columns, dim=1)

    def _log_target(self, theta: Tensor, x: Tensor, track_gradients: bool = False) -> Tensor:
        """The unnormalised log target of θ `(N, B, D)` at x `(B, *x_shape)`, `(N, B)`."""
        check_bool("track_gradients", track_gradients)
        theta, main = theta.to(device_of(self)), self.posterior_estimator
        with torch.set_grad_enabled(track_gradients), embedded_once(main, x):
            return log_pool_at(main, x, self.power, theta, self.proxy.log_potential(theta, x))

    def _observation(self, x: Any) -> Tensor:
        """One observation `(1, *x_shape)` on the posterior's device, the default if None."""
        return self._usable(check_observation, self.default_x if x is None else x)

    def _observations(self, x: Any) -> Tensor:
        """Observations `(B, *x_shape)` on the posterior's device."""
        return self._usable(check_observations, x)

    def _usable(self, check: Callable[..., Tensor], x: Any) -> Tensor:
        main = self.posterior_estimator
        return check_missing(main, check(x, main.condition_shape, missing=True).to(device_of(self)))

    def _candidates(
        self,
        num: int | None,
        x: Tensor,
        batch: int = _BATCH,
        show_progress_bars: bool = False,
        adapt: bool = False,
    ) -> Candidates:
        """Candidates at one observation, a function of it and of torch's seed; cached."""
        num = candidates.check_drawing(num, self.num_candidates, batch, show_progress_bars)
        key = (torch.initial_seed(), num, batch, self.power, x.cpu().numpy().tobytes())
        main, how = self.posterior_estimator, (num, batch, show_progress_bars)
        draw = partial(candidates.draw_candidates, main, self.log_potential, x, *how)
        found = self._cache.get_or_draw(key, draw, x.device)
        if not adapt:
            return found
        target = partial(log_pool_at, main, x, self.power)
        draw = partial(candidates.adapted_candidates, main, self.proxy, target, x, num)
        adapted = partial(self._cache.get_or_draw, ("adapted", *key), draw, x.device)
        return candidates.or_adapted(found, adapted)

    def _chunks(
        self, num: int | None, x: Tensor, batch: int = _BATCH, show_progress_bars: bool = False
    ) -> Iterator[tuple[slice, Candidates]]:
        """Rows of x and their candidates, as many at a time as fit into one network call."""
        num = candidates.check_drawing(num, self.num_candidates, batch, show_progress_bars)
        main = self.posterior_estimator
        draw = partial(candidates.draw_candidates, main, self.log_potential, num=num, batch=batch)
        return candidates.in_chunks(draw, x, max(1, batch // num), show_progress_bars)

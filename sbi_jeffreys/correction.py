r"""Correction at inference: the main's draws, resampled by importance weights q̃_ψ/p_φ.

The proxy is often closer to the truth than the amortised main that learned from it, and at one
observation it can be evaluated at will. Drawing many θ_k ∼ p_φ(·|x_o) and resampling them by

    w_k ∝ q̃_ψ(θ_k, x_o) / p_φ(θ_k|x_o),     truncated at w̄ √K  (Ionides 2008),

closes the amortisation gap without MCMC. The effective sample size of the weights says, for this
observation, how far main and proxy agree; where it is low, neither should be trusted blindly.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from sbi.inference.posteriors import DirectPosterior
from torch import Tensor
from torch.distributions import Distribution
from tqdm.auto import tqdm

from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.objective import effective_sample_size, truncated_log_weights
from sbi_jeffreys.proxies.base import Proxy

__all__ = ["CorrectedPosterior"]


class CorrectedPosterior(DirectPosterior):
    """The main's posterior, its draws resampled by truncated importance weights of the proxy.

    A `DirectPosterior`, so everything of sbi that takes one takes this. `sample` returns corrected
    draws; `log_prob` is the proxy's density, normalised by the same importance weights.

    Args:
        main: The main model p_φ(θ|x).
        proxy: The proxy q_ψ whose weights correct it.
        prior: Prior, for sbi's rejection of samples outside it.
        num_candidates: Draws K that are weighted per observation; at least as many as the samples
            asked for.
        **kwargs: Passed to `DirectPosterior`.

    Built by `NPE_Jeffreys.build_corrected_posterior`.
    """

    def __init__(
        self,
        main: ConditionalDensityEstimator,
        proxy: Proxy,
        prior: Distribution,
        num_candidates: int = 20_000,
        **kwargs: Any,
    ) -> None:
        if not isinstance(num_candidates, int) or num_candidates < 1:
            raise ValueError(f"num_candidates must be a positive int, got {num_candidates!r}.")
        super().__init__(posterior_estimator=main, prior=prior, **kwargs)
        self.proxy, self.num_candidates = proxy, num_candidates
        self._purpose = "It resamples the main's draws by importance weights of the proxy."

    def to(self, device: str | torch.device) -> None:
        """Move main, proxy and prior to a device."""
        super().to(device)
        self.proxy.to(device)

    @torch.no_grad()
    def weighted_sample(
        self,
        num_candidates: int,
        x: Tensor | None = None,
        max_sampling_batch_size: int = 10_000,
        show_progress_bars: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Draws of the main and their log importance weights, unnormalised.

        Args:
            num_candidates: K.
            x: One observation; the default x if None.
            max_sampling_batch_size: Draws per network call.
            show_progress_bars: Whether to show progress over network calls.

        Returns:
            θ of shape `(K, D)` and log q̃_ψ − log p_φ of shape `(K,)`; −∞ outside the prior.
        """
        estimator = self.posterior_estimator
        x_o = self._x_else_default_x(x).to(self._device)
        x_o = x_o.reshape(1, *estimator.condition_shape)
        thetas, log_weights = [], []
        starts = range(0, num_candidates, max_sampling_batch_size)
        for start in tqdm(starts, desc="Weighting draws", disable=not show_progress_bars):
            num = min(max_sampling_batch_size, num_candidates - start)
            theta = estimator.sample(torch.Size((num,)), x_o)
            log_p = estimator.log_prob(theta, x_o)
            thetas.append(theta[:, 0])
            log_weights.append((self.proxy.log_potential(theta, x_o) - log_p)[:, 0])
        return torch.cat(thetas), torch.cat(log_weights)

    def effective_sample_size(self, x: Tensor | None = None, num_candidates: int = 2_000) -> float:
        """Effective sample size of the weights at x, as a fraction of the draws, in [0, 1]."""
        _, log_weights = self.weighted_sample(num_candidates, x)
        return float(effective_sample_size(log_weights)) / num_candidates

    def sample(
        self,
        sample_shape: Any = torch.Size(),
        x: Tensor | None = None,
        max_sampling_batch_size: int = 10_000,
        show_progress_bars: bool = True,
    ) -> Tensor:
        """Corrected draws at one observation.

        Args:
            sample_shape: Shape of the draws; the candidates are at least four times as many.
            x: One observation; the default x if None.
            max_sampling_batch_size: Draws per network call.
            show_progress_bars: Whether to show progress over network calls.

        Returns:
            Shape `(*sample_shape, D)`.

        Raises:
            RuntimeError: If no draw of the main has mass under the proxy.
        """
        shape = torch.Size(sample_shape)
        num = max(1, shape.numel())
        theta, log_weights = self.weighted_sample(
            max(self.num_candidates, 4 * num), x, max_sampling_batch_size, show_progress_bars
        )
        log_weights = truncated_log_weights(log_weights)
        if not bool(torch.isfinite(log_weights).any()):
            raise RuntimeError(
                "No draw of the main model has mass under the proxy at this observation: the two "
                "disagree entirely. Use the uncorrected posterior and check x for misspecification."
            )
        # Systematic resampling: unbiased like multinomial, with far fewer duplicates.
        edges = torch.cumsum(log_weights.exp().double(), dim=0)
        points = (torch.arange(num, device=edges.device) + torch.rand(1, device=edges.device)) / num
        rows = torch.searchsorted(edges / edges[-1], points.double()).clamp(max=len(theta) - 1)
        rows = rows[torch.randperm(num, device=rows.device)]
        return theta[rows].reshape(*shape, -1)

    def sample_batched(
        self,
        sample_shape: Any,
        x: Tensor,
        max_sampling_batch_size: int = 10_000,
        show_progress_bars: bool = True,
    ) -> Tensor:
        """Corrected draws for each of B observations, shape `(*sample_shape, B, D)`."""
        rows = tqdm(x, desc="Observations", disable=not show_progress_bars)
        draws = [self.sample(sample_shape, one, max_sampling_batch_size, False) for one in rows]
        return torch.stack(draws, dim=-2)

    def log_prob(
        self,
        theta: Tensor,
        x: Tensor | None = None,
        norm_posterior: bool = True,
        track_gradients: bool = False,
        num_candidates: int = 10_000,
    ) -> Tensor:
        """log q_ψ(θ|x) at one observation.

        Args:
            theta: Parameters, shape `(N, D)`.
            x: One observation; the default x if None.
            norm_posterior: Whether to normalise, by importance sampling from the main.
            track_gradients: Whether gradients flow to θ.
            num_candidates: Draws for the normaliser.

        Returns:
            Shape `(N,)`, −∞ outside the prior.
        """
        log_z: Tensor | float = 0.0
        if norm_posterior:
            _, log_weights = self.weighted_sample(num_candidates, x)
            log_z = torch.logsumexp(log_weights, dim=0) - math.log(num_candidates)
        x_o = self._x_else_default_x(x).to(self._device)
        x_o = x_o.reshape(1, *self.posterior_estimator.condition_shape)
        theta = torch.atleast_2d(theta).to(self._device)
        with torch.set_grad_enabled(track_gradients):
            return self.proxy.log_potential(theta.unsqueeze(1), x_o)[:, 0] - log_z

    def log_prob_batched(
        self,
        theta: Tensor,
        x: Tensor,
        norm_posterior: bool = True,
        track_gradients: bool = False,
    ) -> Tensor:
        """log q_ψ(θ|x) of θ `(N, B, D)` at B observations, shape `(N, B)`."""
        columns = [
            self.log_prob(theta[:, b], x[b], norm_posterior, track_gradients) for b in range(len(x))
        ]
        return torch.stack(columns, dim=1)

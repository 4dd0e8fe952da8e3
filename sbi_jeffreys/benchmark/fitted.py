"""Trained posteriors as the benchmark sees them: samples at one x, densities at many."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sbi_jeffreys import NPE_Jeffreys
from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.diagnostics.calibration import PairDraws
from sbi_jeffreys.networks.embedding import embedded_once
from sbi_jeffreys.objective import truncated_log_weights
from sbi_jeffreys.posteriors.corrected import CorrectedPosterior
from sbi_jeffreys.posteriors.focused import FocusedPosterior

_CHUNK = 100_000  # θ per network call: bounds memory
_MAX_SECONDS = 600.0  # of rejection sampling for one observation


def corrected_posterior(
    inference: NPE_Jeffreys, fast: bool, power: float | None = None
) -> CorrectedPosterior:
    """The corrected posterior; of few candidates in smoke runs."""
    num_candidates = 1000 if fast else 20_000
    return inference.build_corrected_posterior(num_candidates=num_candidates, power=power)


def focused_posterior(inference: NPE_Jeffreys, x: Tensor, fast: bool) -> FocusedPosterior:
    """The posterior focused at one x `(dim_x,)`; after few steps in smoke runs."""
    steps = {"num_steps": 10} if fast else {}
    return inference.focus(x, show_progress_bars=False, **steps)


@dataclass
class FittedMethod(ABC):
    """A trained posterior.

    Attributes:
        info: What training cost and reported: seconds, cpu_seconds, peak_mib, epochs, extras.
        reports: Values that the latest `sample` reported, by name, e.g. the effective sample size.
    """

    info: dict[str, Any] = field(default_factory=dict)
    reports: dict[str, float] = field(default_factory=dict)

    @abstractmethod
    def sample(self, x: Tensor, num_samples: int) -> Tensor:
        """Posterior samples inside the prior at one x `(dim_x,)`: `(num_samples, D)`."""

    def pair_draws(self, theta_true: Tensor, x: Tensor, num_draws: int) -> PairDraws | None:
        """Raw draws at the x of pairs `(B, D)`, `(B, dim_x)`, or None without a density."""
        return None


@dataclass
class SamplerFit(FittedMethod):
    """A posterior of sbi's that is only sampled from: MCMC, flow matching, score-based."""

    posterior: Any = None

    def sample(self, x: Tensor, num_samples: int) -> Tensor:
        drawn = self.posterior.sample((num_samples,), x=x[None], show_progress_bars=False)
        return drawn.detach()


@dataclass
class RefitFit(FittedMethod):
    """A posterior that is fitted at each observation that it is sampled at.

    Attributes:
        posterior_at: A posterior of sbi's for one x, its default x.
    """

    posterior_at: Callable[[Tensor], Any] = field(kw_only=True)

    def sample(self, x: Tensor, num_samples: int) -> Tensor:
        """See `FittedMethod.sample`."""
        drawn = self.posterior_at(x).sample((num_samples,), show_progress_bars=False)
        return drawn.detach()


@dataclass
class EstimatorFit(FittedMethod):
    """One or several density estimators; several are an equal-weight ensemble.

    Attributes:
        posteriors: sbi posteriors, one per estimator, each with `posterior_estimator`.
    """

    posteriors: list[Any] = field(default_factory=list)

    @property
    def estimators(self) -> list[ConditionalDensityEstimator]:
        """The networks p_φ(θ|x)."""
        return [posterior.posterior_estimator for posterior in self.posteriors]

    def sample(self, x: Tensor, num_samples: int) -> Tensor:
        """See `FittedMethod.sample`; an ensemble draws through sbi's `EnsemblePosterior`."""
        from sbi.inference import EnsemblePosterior

        posterior, limit = self.posteriors[0], {"max_sampling_time": _MAX_SECONDS}
        if len(self.posteriors) > 1:
            posterior, limit = EnsemblePosterior(self.posteriors), {}
        drawn = posterior.sample((num_samples,), x=x[None], show_progress_bars=False, **limit)
        return drawn.detach()

    @torch.no_grad()
    def log_prob(self, theta: Tensor, x: Tensor) -> Tensor:
        """Log of the members' mean density, raw: `(S, B, D)`, `(B, dim_x)` → `(S, B)`."""
        nets = self.estimators

        def mean_density(x: Tensor, theta: Tensor) -> Tensor:
            log_probs = torch.stack([_log_prob(net, theta, x) for net in nets])
            return torch.logsumexp(log_probs, 0) - math.log(len(nets))

        return _in_chunks(mean_density, len(theta), x, theta)

    @torch.no_grad()
    def pair_draws(self, theta_true: Tensor, x: Tensor, num_draws: int) -> PairDraws:
        """See `FittedMethod.pair_draws`; an ensemble draws equally often from every member."""
        nets = self.estimators
        share, rest = divmod(num_draws, len(nets))
        sizes = [torch.Size((share + (k < rest),)) for k in range(len(nets))]

        def draw(x: Tensor) -> Tensor:
            return torch.cat([net.sample(size, x) for net, size in zip(nets, sizes) if size[0]])

        theta = _in_chunks(draw, num_draws, x)
        # Draws of one member must not come first, because metrics may use the leading ones only.
        theta = theta[torch.randperm(len(theta))]
        log_true = self.log_prob(theta_true[None], x)[0]
        return PairDraws(theta, self.log_prob(theta, x), log_true)


def _log_prob(net: ConditionalDensityEstimator, theta: Tensor, x: Tensor) -> Tensor:
    """log p_φ of θ `(S, B, D)` at x `(B, *x_shape)`: `(S, B)`."""
    with embedded_once(net, x):
        return net.log_prob(theta, x)


def _in_chunks(
    function: Callable[..., Tensor], num_draws: int, x: Tensor, *columns: Tensor
) -> Tensor:
    """`function(x, *columns)` for x `(B, …)`, columns `(S, B, …)`, in chunks of B: `(S, B, …)`."""
    step = max(1, _CHUNK // max(1, num_draws))
    pieces = zip(x.split(step), *(column.split(step, dim=1) for column in columns))
    return torch.cat([function(*piece) for piece in pieces], dim=1)


@dataclass
class CorrectedFit(FittedMethod):
    """Draws of a main model corrected by importance resampling towards its proxy.

    Coverage is measured on weighted draws of the main model, as many as every other method has:
    with fewer draws than `sample` uses, the correction is coarser there. No NLL is reported: its
    normaliser from so few draws would be biased in the method's favour.

    Attributes:
        main: The uncorrected fit.
        posterior: The corrected posterior.
    """

    main: EstimatorFit = field(kw_only=True)
    posterior: CorrectedPosterior = field(kw_only=True)

    def sample(self, x: Tensor, num_samples: int) -> Tensor:
        """See `FittedMethod.sample`; reports the effective sample size's share as `ess`."""
        self.reports["ess"] = self.posterior.effective_sample_size(x)
        return self.posterior.sample((num_samples,), x=x, show_progress_bars=False)

    @torch.no_grad()
    def pair_draws(self, theta_true: Tensor, x: Tensor, num_draws: int) -> PairDraws:
        """See `FittedMethod.pair_draws`: the main model's draws, weighted to their target."""

        def log_potential(theta: Tensor, log_p: Tensor) -> Tensor:
            def in_order(x: Tensor, theta: Tensor, log_p: Tensor) -> Tensor:
                return self.posterior.log_potential(theta, x, log_p)

            return _in_chunks(in_order, len(theta), x, theta, log_p)

        draws = self.main.pair_draws(theta_true, x, num_draws)
        log_q = log_potential(draws.theta, draws.log_prob)
        log_weights = truncated_log_weights(log_q - draws.log_prob)
        log_true = log_potential(theta_true[None], draws.log_prob_true[None])[0]
        return PairDraws(draws.theta, log_q, log_true, log_weights, normalised=False)

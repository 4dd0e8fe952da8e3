"""Trained posteriors as the benchmark sees them: samples at one x, densities at many."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.diagnostics.calibration import PairDraws
from sbi_jeffreys.networks.embedding import embedded_once
from sbi_jeffreys.objective import truncated_log_weights
from sbi_jeffreys.posteriors.corrected import CorrectedPosterior

__all__ = ["CorrectedFit", "EstimatorFit", "FittedMethod", "SamplerFit"]

_CHUNK = 100_000  # θ per network call: bounds memory
_MAX_SECONDS = 600.0  # of rejection sampling for one observation


@dataclass
class FittedMethod(ABC):
    """A trained posterior.

    Attributes:
        info: What training cost and said: seconds, cpu_seconds, peak_mib, epochs, extras. Extended
            while sampling, e.g. by the effective sample size.
        reports: Per-observation values of the latest `sample`, by name.
    """

    info: dict[str, Any] = field(default_factory=dict)
    reports: dict[str, float] = field(default_factory=dict)

    @abstractmethod
    def sample(self, x: Tensor, num_samples: int) -> Tensor:
        """Posterior samples inside the prior at one x `(dim_x,)`: `(num_samples, D)`."""

    def log_prob(self, theta: Tensor, x: Tensor) -> Tensor | None:
        """Raw log density of θ `(S, B, D)` at x `(B, dim_x)`: `(S, B)`, or None without one."""
        return None

    def pair_draws(self, theta_true: Tensor, x: Tensor, num_draws: int) -> PairDraws | None:
        """Raw draws at the x of pairs `(B, D)`, `(B, dim_x)`, or None without a density."""
        return None


@dataclass
class SamplerFit(FittedMethod):
    """A posterior of sbi's that is only sampled from: MCMC, flow matching, score-based."""

    posterior: Any = None

    def sample(self, x: Tensor, num_samples: int) -> Tensor:
        """See `FittedMethod.sample`."""
        drawn = self.posterior.sample((num_samples,), x=x[None], show_progress_bars=False)
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
        if len(self.posteriors) == 1:
            drawn = self.posteriors[0].sample(
                (num_samples,), x=x[None], show_progress_bars=False, max_sampling_time=_MAX_SECONDS
            )
            return drawn.detach()
        from sbi.inference import EnsemblePosterior

        ensemble = EnsemblePosterior(self.posteriors)
        drawn = ensemble.sample((num_samples,), x=x[None], show_progress_bars=False)
        return drawn.detach()

    @torch.no_grad()
    def log_prob(self, theta: Tensor, x: Tensor) -> Tensor:
        """Log of the members' mean density, raw: `(S, B, D)`, `(B, dim_x)` → `(S, B)`."""
        step = max(1, _CHUNK // max(1, len(theta)))
        columns = [
            torch.stack([_log_prob(net, t, c) for net in self.estimators])
            for t, c in zip(theta.split(step, dim=1), x.split(step))
        ]
        return torch.logsumexp(torch.cat(columns, dim=-1), 0) - math.log(len(self.estimators))

    @torch.no_grad()
    def pair_draws(self, theta_true: Tensor, x: Tensor, num_draws: int) -> PairDraws:
        """See `FittedMethod.pair_draws`; an ensemble draws equally often from every member."""
        share, rest = divmod(num_draws, len(self.estimators))
        counts = [share + (k < rest) for k in range(len(self.estimators))]
        step = max(1, _CHUNK // num_draws)
        theta = torch.cat(
            [_draw(self.estimators, counts, columns) for columns in x.split(step)], dim=1
        )
        # Draws of one member must not come first: metrics may use the leading ones only.
        theta = theta[torch.randperm(len(theta))]
        log_true = self.log_prob(theta_true[None], x)[0]
        return PairDraws(theta, self.log_prob(theta, x), log_true)


def _log_prob(net: ConditionalDensityEstimator, theta: Tensor, x: Tensor) -> Tensor:
    """log p_φ of θ `(S, B, D)` at x `(B, *x_shape)`: `(S, B)`."""
    with embedded_once(net, x):
        return net.log_prob(theta, x)


def _draw(nets: list[ConditionalDensityEstimator], counts: list[int], x: Tensor) -> Tensor:
    """`counts[k]` raw draws of every net k at each x: `(Σ counts, B, D)`."""
    return torch.cat([net.sample(torch.Size((c,)), x) for net, c in zip(nets, counts) if c])


@dataclass
class CorrectedFit(FittedMethod):
    """Draws of a main model corrected by importance resampling towards its proxy.

    Coverage is read on weighted draws of the main, as many as every other method has: with fewer
    draws than `sample` uses, the correction is coarser there. No NLL is reported: its normaliser
    from so few draws would be biased in its favour.

    Attributes:
        main: The uncorrected fit.
        posterior: The `CorrectedPosterior`, or None where training fell back to plain NPE.
    """

    main: EstimatorFit = field(default_factory=EstimatorFit)
    posterior: CorrectedPosterior | None = None

    def sample(self, x: Tensor, num_samples: int) -> Tensor:
        """See `FittedMethod.sample`; reports the effective sample size's share as `ess`."""
        if self.posterior is None:
            return self.main.sample(x, num_samples)
        self.reports["ess"] = self.posterior.effective_sample_size(x)
        return self.posterior.sample((num_samples,), x=x, show_progress_bars=False)

    @torch.no_grad()
    def pair_draws(self, theta_true: Tensor, x: Tensor, num_draws: int) -> PairDraws:
        """See `FittedMethod.pair_draws`: the main's draws, weighted to their target."""
        draws = self.main.pair_draws(theta_true, x, num_draws)
        if self.posterior is None:
            return draws
        log_q = self._log_potential(draws.theta, x, draws.log_prob)
        log_weights = truncated_log_weights(log_q - draws.log_prob)
        log_true = self._log_potential(theta_true[None], x, draws.log_prob_true[None])[0]
        return PairDraws(draws.theta, log_q, log_true, log_weights, normalised=False)

    def _log_potential(self, theta: Tensor, x: Tensor, log_p: Tensor) -> Tensor:
        """The target in chunks over observations, `(S, B)`."""
        assert self.posterior is not None
        step = max(1, _CHUNK // len(theta))
        pieces = zip(theta.split(step, dim=1), x.split(step), log_p.split(step, dim=1))
        return torch.cat([self.posterior.log_potential(*piece) for piece in pieces], dim=1)

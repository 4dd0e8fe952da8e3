"""Reference samplers for posteriors without a closed form, with convergence checks that can fail.

Every sampler has the same steps: a proposal that covers the posterior, importance weights against
the true one, and rejection, so that the draws kept are independent and without duplicates.
`adaptive_importance_sample` finds the proposal by population Monte Carlo (Cappé et al. 2008)
along tempered targets; tasks with a good proposal call `accept_weighted` directly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ._student import StudentMixture

# Rejection needs a bound on the weights. The bound is set where the weights above it hold
# this share of the total weight, so the draws' total variation error is at most this much.
_TRUNCATED_MASS = 1e-3

_DF_WHILE_TEMPERED = 30.0


class ReferenceConvergenceError(RuntimeError):
    """A reference sampler did not reach the posterior well enough to be called a reference."""

    def __init__(self, task: str, what: str, obtained: float, required: float) -> None:
        super().__init__(
            f"reference posterior of {task}: {what} is {obtained:.4g}, required {required:.4g}. "
            "The samples would not be trustworthy and are not returned; check that x is a "
            "plausible output of the simulator."
        )
        self.task, self.what = task, what
        self.obtained, self.required = obtained, required


class Proposal(Protocol):
    """A distribution with draws `(*sample_shape, D)` and a log density `(N, D)` → `(N,)`."""

    def sample(self, sample_shape: torch.Size) -> Tensor: ...

    def log_prob(self, value: Tensor) -> Tensor: ...


def effective_sample_size(log_weights: Tensor) -> float:
    """Kish's (Σw)²/Σw² of log weights `(N,)`; 0 where no weight is positive."""
    if not bool(torch.isfinite(log_weights).any()):
        return 0.0
    weights = torch.exp(log_weights - log_weights.max())
    return float(weights.sum() ** 2 / weights.square().sum())


def rejection_sample(
    propose: Callable[[int], tuple[Tensor, Tensor]],
    num_samples: int,
    task: str,
    min_acceptance: float = 1e-5,
) -> Tensor:
    """Exact rejection sampling in growing batches: draws `(num_samples, D)`.

    `propose` maps a count N to candidates `(N, D)` and whether each of them is accepted `(N,)`;
    `task` is the name in the error message.

    Raises:
        ReferenceConvergenceError: If the acceptance rate is below `min_acceptance`.
    """
    kept: list[Tensor] = []
    num_kept = num_proposed = 0
    batch = 2 * num_samples + 100
    while num_kept < num_samples:
        candidates, accepted = propose(batch)
        kept.append(candidates[accepted])
        num_kept += int(accepted.sum())
        num_proposed += batch
        # The constant 10 keeps a small first batch without hits from ending the search.
        if num_kept + 10 < min_acceptance * num_proposed:
            raise ReferenceConvergenceError(
                task, "the acceptance rate", num_kept / num_proposed, min_acceptance
            )
        batch = min(2 * batch, 200_000)
    return torch.cat(kept)[:num_samples]


def accept_weighted(
    propose: Callable[[int], tuple[Tensor, Tensor]],
    num_samples: int,
    task: str,
    min_efficiency: float = 0.02,
    max_draws_per_sample: int = 200,
) -> Tensor:
    """Turn weighted proposals into independent posterior draws `(num_samples, D)` by rejection.

    The draws are within 1e-3 of the posterior in total variation. `propose` maps a count N to
    draws `(N, D)` and log importance weights `(N,)`; `task` is the name in the error message.

    Raises:
        ReferenceConvergenceError: If the effective sample size stays below 2 × num_samples, or
            below `min_efficiency` per proposal draw, or a few large weights leave too few draws
            to accept after `max_draws_per_sample` proposals per returned draw.
    """
    draws, log_weights = propose(4 * num_samples + 2_000)
    max_draws = max_draws_per_sample * num_samples + 100_000
    while True:
        ess = effective_sample_size(log_weights)
        required = max(2.0 * num_samples, min_efficiency * len(draws))
        if ess < min_efficiency * len(draws):
            raise ReferenceConvergenceError(task, "the effective sample size", ess, required)
        log_bound = _truncation_level(log_weights)
        log_acceptance = (log_weights - log_bound).clamp_max(0.0)
        expected = float(log_acceptance.exp().sum())
        if expected >= 1.1 * num_samples + 50 and ess >= required:
            accepted = torch.log(torch.rand_like(log_acceptance)) < log_acceptance
            if int(accepted.sum()) >= num_samples:
                return draws[accepted][:num_samples]
        if len(draws) >= max_draws:
            if ess < required:
                raise ReferenceConvergenceError(task, "the effective sample size", ess, required)
            raise ReferenceConvergenceError(
                task, f"the yield of {len(draws)} draws", expected, 1.1 * num_samples + 50
            )
        short = max(1.2 * num_samples / max(expected, 1.0), 2.2 * num_samples / ess)
        extra = int(len(draws) * min(max(short - 1.0, 0.25), 4.0))
        more = propose(min(extra, max_draws))
        draws = torch.cat((draws, more[0]))
        log_weights = torch.cat((log_weights, more[1]))


def adaptive_importance_sample(
    log_target: Callable[[Tensor], Tensor],
    initial: Proposal,
    num_samples: int,
    task: str,
    *,
    num_components: int = 3,
    df: float = 5.0,
    draws_per_round: int = 2_000,
    max_rounds: int = 25,
    min_efficiency: float = 0.05,
) -> Tensor:
    """Sample a low-dimensional posterior known up to a constant.

    Draws of `initial` are reweighted to initial^(1−t) · target^t with the largest t that keeps a
    tenth of them effective, a Student-t mixture is fitted, and so on until t = 1. Tempering
    from the prior keeps separate modes, which a local optimiser would lose.

    Args:
        log_target: Unnormalised log density, `(N, D)` → `(N,)`; float64.
        initial: The first proposal: the prior, or an approximation of the target.
        num_samples: Number of draws to return.
        task: Name in the error message.
        num_components: Components of the mixture.
        df: Degrees of freedom of the mixture; fewer cover heavier tails.
        draws_per_round: Draws per adaptation round.
        max_rounds: Rounds after which adaptation ends.
        min_efficiency: Required effective sample size per draw of the final proposal.

    Returns:
        Draws `(num_samples, D)`.

    Raises:
        ReferenceConvergenceError: If adaptation or the final weights fail their checks.
    """
    proposal: Proposal = initial
    size = torch.Size((draws_per_round,))
    best: tuple[float, Proposal] = (0.0, initial)
    temperature, num_at_target = 0.0, 0
    for _ in range(max_rounds):
        draws = proposal.sample(size)
        log_initial, log_q = initial.log_prob(draws), proposal.log_prob(draws)
        log_p = _nan_to_zero_mass(log_target(draws))
        efficiency = effective_sample_size(log_p - log_q) / draws_per_round
        if efficiency > best[0]:
            best = (efficiency, proposal)
        num_at_target += temperature == 1.0
        # Four fits at the target itself: later ones only follow the noise of their draws.
        if best[0] >= 0.6 or num_at_target >= 4:
            break
        tempered = partial(_tempered, log_initial, log_p, log_q)
        temperature = largest_temperature(tempered, 0.1 * draws_per_round)
        log_w, required = tempered(temperature), 2.0 * draws.shape[-1]
        if (ess := effective_sample_size(log_w)) < required:
            what = "the effective sample size while adapting"
            raise ReferenceConvergenceError(task, what, ess, required)
        # Heavy tails bound the final weights; at lower temperatures they would waste draws, and
        # simulators can be slow far from the posterior.
        tails = df if temperature == 1.0 else max(df, _DF_WHILE_TEMPERED)
        proposal = StudentMixture.fit(draws, log_w, num_components, tails)
    if best[0] < min_efficiency:
        raise ReferenceConvergenceError(
            task, "the effective sample size per draw after adaptation", best[0], min_efficiency
        )
    final = best[1]

    def propose(count: int) -> tuple[Tensor, Tensor]:
        draws = final.sample(torch.Size((count,)))
        log_p = _nan_to_zero_mass(log_target(draws))
        return draws, log_p - final.log_prob(draws)

    return accept_weighted(propose, num_samples, task, min_efficiency)


def _nan_to_zero_mass(log_density: Tensor) -> Tensor:
    """Give −∞ where a solver failed; `torch.nan_to_num` would make other −∞ finite."""
    return torch.where(log_density.isnan(), -torch.inf, log_density)


def _truncation_level(log_weights: Tensor) -> float:
    """The smallest weight above which at most `_TRUNCATED_MASS` of the total is cut off."""
    ordered = log_weights.sort(descending=True).values
    weights = torch.exp(ordered - ordered[0])
    count = torch.arange(1, len(weights) + 1, dtype=weights.dtype)
    cut_off = weights.cumsum(0) - count * weights
    last = int((cut_off <= _TRUNCATED_MASS * weights.sum()).sum()) - 1
    return float(ordered[last])


def _tempered(log_initial: Tensor, log_p: Tensor, log_q: Tensor, temperature: float) -> Tensor:
    """(1 − t) log initial + t log target − log q, −∞ wherever the target vanishes."""
    mixed = (1.0 - temperature) * log_initial + temperature * log_p - log_q
    return torch.where(torch.isfinite(log_p), mixed, -torch.inf)


def largest_temperature(log_weights: Callable[[float], Tensor], min_ess: float) -> float:
    """The largest t in [0, 1] whose log weights keep `min_ess` draws effective, by bisection."""
    if effective_sample_size(log_weights(1.0)) >= min_ess:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        enough = effective_sample_size(log_weights(middle)) >= min_ess
        low, high = (middle, high) if enough else (low, middle)
    return low

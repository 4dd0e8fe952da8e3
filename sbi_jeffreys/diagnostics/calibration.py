r"""Is a posterior calibrated? Ranks of the true θ among the posterior's draws, and tests on them.

Draw pairs (θ*, x) from the joint and S draws θ_k ∼ p_φ(·|x). Where p_φ is the exact posterior, θ*
and the θ_k are exchangeable, so the rank of θ* under *any* statistic is uniform. Two statistics are
used here:

- the density: the share of draws denser than θ* is the mass of the smallest HPD region that holds
  θ*, so the distribution function of that share is the expected coverage (Hermans et al. 2022,
  arXiv 2110.06581);
- the coordinates, one by one (simulation-based calibration; Talts et al. 2018, arXiv 1804.06788),
  which show in which parameter, and in which direction, something is wrong.

Ranks are (r + U)/(S + 1) with U uniform, which is uniform on (0, 1) exactly, for any S and with
ties. Samples of θ come first: `(S, B, D)`, S draws for each of B pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import binom
from torch import Tensor
from torch.distributions import Distribution

from sbi_jeffreys._checks import (
    check_bool,
    check_float,
    check_instance,
    check_not_empty,
    check_prior,
    check_tensor,
)
from sbi_jeffreys.networks.prior_space import inside_support

__all__ = [
    "Coverage",
    "CoverageCurve",
    "PairDraws",
    "coverage_curve",
    "expected_coverage",
    "held_out_nll",
    "hpd_ranks",
    "inside_prior",
    "leakage",
    "marginal_ranks",
]

_BAND = 0.99  # pointwise probability of the band around a coverage curve


@dataclass(frozen=True)
class PairDraws:
    """Draws of an approximate posterior at the x of B fresh pairs, with their densities.

    Attributes:
        theta: Raw draws before any rejection, `(S, B, D)`.
        log_prob: Their log density in nats, `(S, B)`; up to a constant per x if not `normalised`.
        log_prob_true: Log density of the pairs' own θ*, `(B,)`, up to the same constants.
        log_weights: Log importance weights `(S, B)` of draws from another distribution, or None.
        normalised: Whether `log_prob` is a density, so that NLL and divergences exist.

    Raises:
        TypeError, ValueError: If a field is of another type or shape.
    """

    theta: Tensor
    log_prob: Tensor
    log_prob_true: Tensor
    log_weights: Tensor | None = None
    normalised: bool = True

    def __post_init__(self) -> None:
        check_tensor("theta", self.theta, ("S", "B", "D"))
        num, batch = self.theta.shape[:2]
        check_tensor("log_prob", self.log_prob, (num, batch))
        check_tensor("log_prob_true", self.log_prob_true, (batch,))
        if self.log_weights is not None:
            check_tensor("log_weights", self.log_weights, (num, batch))
        check_bool("normalised", self.normalised)


@dataclass(frozen=True)
class Coverage:
    """Empirical coverage of the HPD regions of one level, with its binomial standard error."""

    level: float
    value: float
    standard_error: float


@dataclass(frozen=True)
class CoverageCurve:
    """Expected coverage over the nominal level.

    Attributes:
        levels: Nominal levels in (0, 1), `(L,)`.
        values: Share of pairs whose θ* is in the HPD region of that level, `(L,)`.
        lower: Lower end of the interval in which the value of an exact posterior lies with 99 %
            probability, level by level, `(L,)`.
        upper: Upper end of that interval, `(L,)`.
        num_pairs: Number of pairs.
    """

    levels: Tensor
    values: Tensor
    lower: Tensor
    upper: Tensor
    num_pairs: int


def inside_prior(prior: Distribution, theta: Tensor) -> Tensor:
    """Whether θ `(*B, D)` lies in the prior's support, `(*B,)`; non-finite θ does not.

    Raises:
        TypeError: If the prior has no `log_prob`, or θ is no tensor of floats.
        ValueError: If θ has no dimension.
    """
    check_prior(prior, ("log_prob",))
    if check_tensor("theta", theta).ndim == 0:
        raise ValueError("theta must have shape (*B, D), got shape (); pass theta.reshape(1, 1).")
    finite = torch.isfinite(theta).all(-1)
    safe = torch.where(finite.unsqueeze(-1), theta, torch.zeros_like(theta))
    inside = inside_support(prior, safe.reshape(-1, theta.shape[-1]))
    return finite & inside.reshape(finite.shape)


def leakage(inside: Tensor) -> float:
    """Mass of the raw estimator outside the prior, in [0, 1]: the mean of `~inside`, `(S, B)`."""
    _check_mask(inside)
    return float((~inside).double().mean())


def held_out_nll(log_prob_true: Tensor) -> tuple[float, float]:
    """Mean of −log p_φ(θ*|x) over pairs, in nats, with its standard error.

    The density is the raw estimator's, leaked mass included, as in sbi's validation loss.

    Args:
        log_prob_true: log p_φ(θ*|x), `(B,)`, at least one.
    """
    _check_pairs("log_prob_true", log_prob_true)
    return mean_and_error(-log_prob_true)


def mean_and_error(values: Tensor, weights: Tensor | None = None) -> tuple[float, float]:
    """Mean of `(N,)` and its standard error, NaN for a single value.

    With weights `(N,)`, both are those of the weighted mean, whatever the weights sum to, and
    values without weight may be infinite. Constant weights have no effect.
    """
    values = values.double()
    # mutant: errors-of-excluded-pairs
    if weights is not None and bool((weights != weights[0]).any()):
        values, share = values[weights > 0], weights[weights > 0].double()
        share = share / share.sum()
        mean = (share * values).sum()
        variance = (share**2 * (values - mean) ** 2).sum()
        effective = 1 / (share**2).sum()  # number of values, by Kish; 0 / 0 below where it is one
        return float(mean), float((variance * effective / (effective - 1)).sqrt())
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), error


def hpd_ranks(draws: PairDraws, inside: Tensor, randomised: bool = True) -> Tensor:
    """Rank of each θ* by density: 0 at the densest point, 1 where every draw is denser.

    Args:
        draws: Draws and densities at B pairs.
        inside: Whether the draws lie in the prior's support, `(S, B)`; those outside are dropped.
        randomised: Whether ranks are randomised, and so exactly uniform under the exact posterior;
            (r + ½)/(S + 1) otherwise.

    Returns:
        `(B,)`; ∞ for pairs without a single draw inside, which no region covers.
    """
    weights, true = _weights(draws, inside), draws.log_prob_true
    check_bool("randomised", randomised)
    return _ranks(draws.log_prob > true, draws.log_prob == true, weights, inside, randomised)


def marginal_ranks(draws: PairDraws, theta_true: Tensor, inside: Tensor) -> Tensor:
    """Rank of each coordinate of θ* among those of the draws, `(B, D)`.

    Args:
        draws: Draws at B pairs.
        theta_true: θ*, `(B, D)`.
        inside: Whether the draws lie in the prior's support, `(S, B)`.
    """
    weights = _weights(draws, inside)
    check_tensor("theta_true", theta_true, draws.theta.shape[1:])
    pairs = zip(draws.theta.unbind(-1), theta_true.unbind(-1))
    columns = [_ranks(drawn < t, drawn == t, weights, inside, True) for drawn, t in pairs]
    return torch.stack(columns, dim=1)


def _check_pairs(name: str, values: Tensor) -> None:
    """Require one value for each of at least one pair."""
    check_not_empty(name, check_tensor(name, values, ("B",)), "pair", "pass some pairs")


def _check_mask(inside: Tensor, shape: tuple[int, ...] | None = None) -> None:
    """Require a tensor of booleans, of a shape if one is given, with at least one entry."""
    remedy = "pass what inside_prior(prior, draws.theta) returns"
    check_instance("inside", inside, Tensor, remedy)
    if inside.dtype != torch.bool:
        raise TypeError(f"inside must be a tensor of bool, got dtype {inside.dtype}; {remedy}.")
    if inside.numel() == 0 or (shape is not None and tuple(inside.shape) != shape):
        expected = "that is not empty" if shape is None else f"of shape {shape}"
        raise ValueError(
            f"inside must be a tensor {expected}, got shape {tuple(inside.shape)}; {remedy}."
        )


def _check_levels(levels: Sequence[float]) -> list[float]:
    """Require levels in (0, 1), at least one."""
    values = levels.tolist() if isinstance(levels, Tensor) else levels
    check_instance("levels", values, (list, tuple), "pass a list of numbers in (0, 1)")
    check_not_empty("levels", values, "level", "pass (0.5, 0.9), say")
    return [check_float("levels", v, 0.0, 1.0, low_open=True, high_open=True) for v in values]


def _weights(draws: PairDraws, inside: Tensor) -> Tensor:
    """Weights `(S, B)` of the draws, 0 outside the prior, after a check of both arguments."""
    check_instance("draws", draws, PairDraws)
    _check_mask(inside, tuple(draws.log_prob.shape))
    weights = inside.double()
    if draws.log_weights is None:
        return weights
    relative = draws.log_weights - draws.log_weights.max(dim=0, keepdim=True).values
    return weights * relative.nan_to_num(nan=-math.inf).double().exp()


def _ranks(below: Tensor, ties: Tensor, weights: Tensor, inside: Tensor, random: bool) -> Tensor:
    """Ranks `(B,)` of θ* from which draws are below it and which tie with it, `(S, B)` each."""
    total, count = weights.sum(0), inside.double().sum(0)
    share = (weights * below.double()).sum(0) / total
    if random:
        tied = (weights * ties.double()).sum(0) / total
        place = share * count + torch.rand_like(total) * (1 + tied * count)
    else:
        place = share * count + 0.5
    return torch.where(total > 0, place / (count + 1), math.inf)


def expected_coverage(
    draws: PairDraws, inside: Tensor, levels: Sequence[float] = (0.5, 0.9, 0.95)
) -> tuple[Coverage, ...]:
    """How often θ* falls into the HPD region of each level.

    θ* is in the region of level α if at most α of the posterior's mass is denser than θ*. The rank
    of θ* by density, not randomised, estimates that mass.

    Args:
        draws: Draws and densities at B pairs.
        inside: Whether the draws lie in the prior's support, `(S, B)`.
        levels: Nominal levels in (0, 1).

    Returns:
        One entry per level. Pairs without a single draw inside count as not covered.
    """
    ranks, grid = hpd_ranks(draws, inside, randomised=False), _check_levels(levels)
    shares = [float((ranks <= level).double().mean()) for level in grid]
    errors = [math.sqrt(share * (1 - share) / len(ranks)) for share in shares]
    return tuple(map(Coverage, grid, shares, errors))


def coverage_curve(ranks: Tensor, levels: Sequence[float] | None = None) -> CoverageCurve:
    """The coverage at many levels, with the binomial band of an exact posterior.

    Args:
        ranks: Ranks by density, from `hpd_ranks`, `(B,)`.
        levels: Nominal levels in (0, 1); 0.02, 0.04, … 0.98 if None.
    """
    _check_pairs("ranks", ranks)
    chosen = torch.linspace(0.02, 0.98, 49).tolist() if levels is None else _check_levels(levels)
    grid = torch.tensor(chosen, dtype=torch.float64)
    num, tail = len(ranks), (1 - _BAND) / 2
    values = (ranks.unsqueeze(0) <= grid.to(ranks).unsqueeze(1)).double().mean(1).cpu()
    lower, upper = (binom.ppf(q, num, grid.numpy()) / num for q in (tail, 1 - tail))
    return CoverageCurve(grid, values, torch.as_tensor(lower), torch.as_tensor(upper), num)

"""How far importance weights can be trusted: effective sample size, Pareto k̂, and a warning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import FitError, genpareto
from torch import Tensor

from sbi_jeffreys._checks import check_tensor, warn
from sbi_jeffreys.objective import effective_sample_size

__all__ = ["ImportanceQuality", "importance_quality", "pareto_k", "warn_if_unreliable"]

_MIN_DRAWS = 100  # with fewer effective draws, samples are mostly copies of one another
_MAX_PARETO_K = 0.7  # above it importance sampling is unreliable at any practical number of draws
# Share of effective draws from which on k̂ does not count: the weights are nearly equal, and the
# tail, however heavy, belongs to a small part of the draws.
_NEARLY_EQUAL = 0.5
_MIN_TAIL = 5  # fewest weights that a tail is fitted to


@dataclass(frozen=True)
class ImportanceQuality:
    """How far importance weights at one observation can be trusted.

    Attributes:
        effective_sample_size: Kish's, as a fraction of the candidates, in [0, 1].
        pareto_k: Shape k̂ of the generalised Pareto tail of the weights; they have a finite variance
            for k < 0.5, and importance sampling is unreliable for k > 0.7.
        num_candidates: Candidates that both were estimated from.
    """

    effective_sample_size: float
    pareto_k: float
    num_candidates: int

    @property
    def effective_draws(self) -> float:
        """How many independent draws of the target the candidates are worth."""
        return self.effective_sample_size * self.num_candidates

    @property
    def reliable(self) -> bool:
        """Whether there are at least 100 effective draws, and k̂ is at most 0.7.

        k̂ does not count where half of the draws or more are effective.
        """
        # mutant: tail-of-nearly-equal-weights
        light = self.pareto_k <= _MAX_PARETO_K or self.effective_sample_size >= _NEARLY_EQUAL
        return self.effective_draws >= _MIN_DRAWS and light


def importance_quality(log_weights: Tensor) -> ImportanceQuality:
    """Effective sample size and Pareto k̂ of K unnormalised log weights `(K,)`."""
    check_tensor("log_weights", log_weights, ("K",))
    num = len(log_weights)
    share = float(effective_sample_size(log_weights.double())) / max(1, num)
    return ImportanceQuality(share, pareto_k(log_weights), num)


def pareto_k(log_weights: Tensor) -> float:
    """Shape k̂ of the generalised Pareto distribution fitted to the largest weights.

    The fit is maximum likelihood, to the exceedances of the M = min(0.2 S, 3 √S) largest of S
    positive weights over the next one (Vehtari et al. 2024, arXiv 1507.02646).

    Args:
        log_weights: Log importance weights, unnormalised, `(S,)`; draws of weight zero (−∞) are
            dropped, because they do not change the shape of the tail.

    Returns:
        k̂; −∞ where the largest weights are all equal, +∞ where fewer than five weights are left to
        fit to, or a weight is infinite.

    Raises:
        TypeError, ValueError: If the argument is no tensor of floats `(S,)`.
    """
    check_tensor("log_weights", log_weights, ("S",))
    values = log_weights.detach().double().cpu().numpy()
    if bool(np.isposinf(values).any()):
        return math.inf
    values = np.sort(values[np.isfinite(values)])
    size = int(min(0.2 * len(values), 3 * math.sqrt(len(values))))
    if size < _MIN_TAIL:
        return math.inf
    weights = np.exp(values[-size - 1 :] - values[-1])
    if weights[0] > 1 - 1e-5:  # equal but for rounding
        return -math.inf
    exceedances = weights[weights > weights[0]] - weights[0]
    if len(exceedances) < _MIN_TAIL:
        return math.inf
    try:
        with np.errstate(all="ignore"):
            shape, _, _ = genpareto.fit(exceedances / exceedances.mean(), floc=0)
    except FitError:
        return math.inf
    return float(shape)


def warn_if_unreliable(qualities: Sequence[ImportanceQuality]) -> None:
    """Warn once about all observations at which the weights are unreliable."""
    bad = [quality for quality in qualities if not quality.reliable]
    if not bad:
        return
    worst = min(bad, key=lambda quality: quality.effective_draws)
    where = "this observation" if len(qualities) == 1 else f"{len(bad)} of {len(qualities)} x"
    which = "the" if len(bad) == 1 else "at the worst of them, the"
    warn(
        f"The corrected posterior is unreliable at {where}: {which} {worst.num_candidates:,} "
        f"candidates are worth {worst.effective_draws:.0f} independent draws (at least "
        f"{_MIN_DRAWS} are needed), and Pareto k̂ of their weights is {worst.pareto_k:.2f} (at most "
        f"{_MAX_PARETO_K}, unless half of the candidates are effective). The main model and the "
        "proxy disagree there. Use build_posterior() for such x, or a smaller power or more "
        "num_candidates in build_corrected_posterior, and check whether x looks like the "
        "simulations.",
    )

"""Weighted candidates at one observation: how reliable their weights are, and a cache of them."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.stats import FitError, genpareto
from torch import Tensor

from sbi_jeffreys._checks import JeffreysWarning, check_tensor
from sbi_jeffreys.objective import effective_sample_size, truncated_log_weights

__all__ = [
    "CandidateCache",
    "Candidates",
    "ImportanceQuality",
    "importance_quality",
    "pareto_k",
    "resample",
    "seed_of",
    "seeded",
    "warn_if_unreliable",
]

_MIN_DRAWS = 100  # effective draws below which samples are mostly copies of one another
_MAX_PARETO_K = 0.7  # above it importance sampling is unreliable at any practical number of draws
_MIN_TAIL = 5  # weights that a tail is fitted to
_MAX_ENTRIES, _MAX_NUMBERS = 4, 10_000_000  # of a cache: observations, and floats in all (40 MB)


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
        """Whether there are at least 100 effective draws, and k̂ is at most 0.7."""
        return self.effective_draws >= _MIN_DRAWS and self.pareto_k <= _MAX_PARETO_K


@dataclass(frozen=True)
class Candidates:
    """Draws of the main model with their log importance weights.

    Attributes:
        theta: θ_k ∼ p_φ(·|x), `(K, B, D)`.
        log_weights: Unnormalised and not truncated, `(K, B)`; −∞ outside the prior.
    """

    theta: Tensor
    log_weights: Tensor

    @cached_property
    def quality(self) -> list[ImportanceQuality]:
        """One entry for each of the B observations."""
        return [importance_quality(column) for column in self.log_weights.T]

    @property
    def log_normaliser(self) -> Tensor:
        """Log of the mean weight, `(B,)`: the integral of the target over that of the main."""
        return torch.logsumexp(self.log_weights, dim=0) - math.log(len(self.log_weights))


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
        log_weights: Log importance weights, unnormalised, `(S,)`; draws of weight zero (−∞) do not
            change the shape of the tail and are left out.

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
    exceedances = weights[1:] - weights[0]
    exceedances = exceedances[exceedances > 0]
    if len(exceedances) < _MIN_TAIL:
        return math.inf
    try:
        with np.errstate(all="ignore"):
            shape, _, _ = genpareto.fit(exceedances / exceedances.mean(), floc=0)
    except FitError:
        return math.inf
    return float(shape)


def warn_if_unreliable(qualities: Sequence[ImportanceQuality], stacklevel: int = 3) -> None:
    """Warn once about all observations at which the weights are unreliable.

    Args:
        qualities: One entry per observation.
        stacklevel: Frames between this function and the line that the warning names.
    """
    bad = [quality for quality in qualities if not quality.reliable]
    if not bad:
        return
    worst = min(bad, key=lambda quality: quality.effective_draws)
    where = "this observation" if len(qualities) == 1 else f"{len(bad)} of {len(qualities)} x"
    which = "the" if len(bad) == 1 else "at the worst of them, the"
    warnings.warn(
        f"The corrected posterior is unreliable at {where}: {which} {worst.num_candidates:,} "
        f"candidates are worth {worst.effective_draws:.0f} independent draws (at least "
        f"{_MIN_DRAWS} are needed), and Pareto k̂ of their weights is {worst.pareto_k:.2f} (at most "
        f"{_MAX_PARETO_K}). The main model and the proxy disagree there. Use build_posterior() for "
        "such x, or a smaller power or more num_candidates in build_corrected_posterior, and check "
        "whether x looks like the simulations.",
        JeffreysWarning,
        stacklevel=stacklevel,
    )


def resample(candidates: Candidates, num: int) -> Tensor:
    """Draws `(num, B, D)` of the candidates by truncated importance weights.

    Systematic resampling: unbiased like multinomial resampling, with far fewer duplicates.

    Raises:
        RuntimeError: If at some observation no candidate has a positive weight.
    """
    log_weights = truncated_log_weights(candidates.log_weights)
    empty = torch.where(~torch.isfinite(log_weights).any(dim=0))[0].tolist()
    if empty:
        where = "this observation" if log_weights.shape[1] == 1 else f"observations {empty}"
        raise RuntimeError(
            f"No draw of the main model has mass under the proxy at {where}: the two disagree "
            "entirely. Use the uncorrected posterior and check x for misspecification."
        )
    edges = torch.cumsum(log_weights.exp().double(), dim=0).T.contiguous()
    batch, places = len(edges), torch.arange(num, device=edges.device)
    offsets = torch.rand(batch, 1, device=edges.device, dtype=torch.float64)
    rows = torch.searchsorted(edges / edges[:, -1:], (places + offsets) / num)
    order = torch.rand(batch, num, device=edges.device).argsort(dim=1)
    rows = rows.clamp(max=edges.shape[1] - 1).gather(1, order).T
    return candidates.theta[rows, torch.arange(batch, device=edges.device)]


class CandidateCache:
    """The candidates of the last few observations; the least recently used are dropped first.

    Copies and pickles of a cache are empty.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[Hashable, Candidates] = OrderedDict()

    def __len__(self) -> int:
        """The number of observations that are kept."""
        return len(self._entries)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy as an empty cache."""
        return CandidateCache, ()

    def get(self, key: Hashable) -> Candidates | None:
        """The entry of that key, or None."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: Hashable, candidates: Candidates) -> None:
        """Keep an entry, and drop the oldest ones beyond the bounds on number and memory."""
        self._entries[key] = candidates
        while len(self) > _MAX_ENTRIES or (len(self) and self._numbers() > _MAX_NUMBERS):
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Drop everything."""
        self._entries.clear()

    def _numbers(self) -> int:
        return sum(c.theta.numel() + c.log_weights.numel() for c in self._entries.values())


def seed_of(key: object) -> int:
    """A seed that is a function of the key's representation, the same in every process."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's random numbers follow from the seed; afterwards they go on as before."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield

"""Candidates of a corrected posterior: weighted draws of the main, resampling, and a cache."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.networks.embedding import embedded_once
from sbi_jeffreys.objective import truncated_log_weights
from sbi_jeffreys.posteriors.importance import ImportanceQuality, importance_quality

__all__ = ["CandidateCache", "Candidates", "draw_candidates", "resample", "seeded"]

_MAX_ENTRIES, _MAX_NUMBERS = 4, 10_000_000  # of a cache: observations, and floats in all (40 MB)


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


@torch.no_grad()
def draw_candidates(
    main: ConditionalDensityEstimator,
    log_potential: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    num: int,
    batch: int,
    show_progress_bars: bool = False,
) -> Candidates:
    """Weighted draws of the main, `num` at each of the observations x `(B, *x_shape)`.

    `log_potential(theta, x, log_p)` returns the unnormalised log target, `(K, B)`. A network call
    takes at most `batch` draws, of all observations together.
    """
    step = max(1, batch // len(x))
    starts = tqdm(range(0, num, step), desc="Weighting draws", disable=not show_progress_bars)
    thetas, log_weights = [], []
    with embedded_once(main, x):
        for start in starts:
            theta = main.sample(torch.Size((min(step, num - start),)), x)
            log_p = main.log_prob(theta, x)
            thetas.append(theta)
            log_weights.append(log_potential(theta, x, log_p) - log_p)
    return Candidates(torch.cat(thetas), torch.cat(log_weights))


def resample(candidates: Candidates, num: int) -> Tensor:
    """Draws `(num, B, D)` of the candidates by truncated importance weights.

    Resampling is systematic: unbiased like multinomial resampling, with far fewer duplicates.
    """
    log_weights = truncated_log_weights(candidates.log_weights)
    empty = torch.where(~torch.isfinite(log_weights).any(dim=0))[0].tolist()
    if empty:
        where = "this observation" if log_weights.shape[1] == 1 else f"observations {empty}"
        raise RuntimeError(
            f"No draw of the main model has mass under the proxy at {where}: the two disagree "
            "entirely. Use the uncorrected posterior and ask misspecification_test() whether x is "
            "like the simulations."
        )
    edges = torch.cumsum(log_weights.exp().double(), dim=0).T.contiguous()
    batch, places = len(edges), torch.arange(num, device=edges.device)
    offsets = torch.rand(batch, 1, device=edges.device, dtype=torch.float64)
    rows = torch.searchsorted(edges / edges[:, -1:], (places + offsets) / num)
    order = torch.rand(batch, num, device=edges.device).argsort(dim=1)
    rows = rows.clamp(max=edges.shape[1] - 1).gather(1, order).T
    return candidates.theta[rows, torch.arange(batch, device=edges.device)]


class CandidateCache(dict[Hashable, Candidates]):
    """The candidates of the last few observations; copies and pickles of a cache are empty."""

    def __reduce__(self) -> tuple[Any, ...]:
        return CandidateCache, ()

    def get_or_draw(
        self, key: Hashable, draw: Callable[[], Candidates], device: torch.device
    ) -> Candidates:
        """The entry of that key, drawn if it is missing; the least recently used are dropped.

        The seed of the draws is a function of the key, and torch's generators go on as if nothing
        had been drawn: whether an entry was kept changes the time and no value.
        """
        found = self.pop(key, None)
        if found is None:
            digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
            with seeded(int.from_bytes(digest, "big"), device):  # the same in every process
                found = draw()
        self[key] = found
        numbers = [c.theta.numel() + c.log_weights.numel() for c in self.values()]
        while len(numbers) > _MAX_ENTRIES or sum(numbers) > _MAX_NUMBERS:
            del self[next(iter(self))], numbers[0]
        return found


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

"""Candidates of a corrected posterior: weighted draws of the main or of an adapted proposal."""

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

from sbi_jeffreys._checks import check_bool, check_int, warn
from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.networks.embedding import embedded_once
from sbi_jeffreys.objective import truncated_log_weights
from sbi_jeffreys.posteriors.importance import (
    ImportanceQuality,
    importance_quality,
    warn_if_unreliable,
)
from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.proxies.normaliser import adapted_draws

__all__ = [
    "CandidateCache",
    "Candidates",
    "adapted_candidates",
    "check_drawing",
    "draw_candidates",
    "enough",
    "in_chunks",
    "or_adapted",
    "resample",
    "seeded",
]

_PER_SAMPLE = 4  # candidates for every sample asked for, at least
_BATCHED = 2_000  # most candidates per observation where there are several
_MIN_ADAPTED, _MAX_ADAPTED = 4, 10_000  # draws of one adaptation
_MAX_ENTRIES, _MAX_NUMBERS = 4, 10_000_000  # observations in a cache, and floats in all (40 MB)


@dataclass(frozen=True)
class Candidates:
    """Draws at B observations with their log importance weights.

    Attributes:
        theta: Draws of the main or of another proposal, `(K, B, D)`.
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
        """Log of the mean weight, `(B,)`: of the target's integral over the proposal's."""
        return torch.logsumexp(self.log_weights, dim=0) - math.log(len(self.log_weights))


def check_drawing(num: int | None, default: int, batch: int, show_progress_bars: bool) -> int:
    """How many candidates to draw, after a check of all arguments."""
    check_int("max_sampling_batch_size", batch, 1)
    check_bool("show_progress_bars", show_progress_bars)
    return check_int("num_candidates", default if num is None else num, 1)


def enough(num_candidates: int, sample_shape: torch.Size, batched: bool = False) -> int:
    """How many candidates at one observation: a posterior's own number, or more for many samples.

    Where there are several observations, the posterior's own number counts only up to 2,000.
    """
    own = min(num_candidates, _BATCHED) if batched else num_candidates
    return max(own, _PER_SAMPLE * sample_shape.numel())


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


def in_chunks(
    draw: Callable[[Tensor], Candidates], x: Tensor, size: int, show_progress_bars: bool = False
) -> Iterator[tuple[slice, Candidates]]:
    """Rows of x, `size` at a time, and the candidates that `draw` returns for them."""
    starts = range(0, len(x), size)
    for start in tqdm(starts, desc="Batches of observations", disable=not show_progress_bars):
        rows = slice(start, start + size)
        yield rows, draw(x[rows])


@torch.no_grad()
def adapted_candidates(
    main: ConditionalDensityEstimator,
    proxy: Proxy,
    log_target: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    num: int,
) -> Candidates:
    """Weighted draws of proposals that follow the proxy, at one x.

    There are `num` draws up to 10,000. For a larger `num` there are half as many, but not fewer
    than 10,000: more of these draws are effective than of the main's. A proposal is a mixture that
    is fitted to weighted draws several times (`proxies.normaliser.adapted_draws`); every 10,000
    draws have a proposal of their own, which bounds memory. `log_target(theta, log_q)` returns the
    unnormalised log target of θ whose log q̃ is known, `(K, 1)`.
    """
    own = main.sample(torch.Size((1,)), x)[0]
    num = max(_MIN_ADAPTED, min(num, max(num // 2, _MAX_ADAPTED)))
    num_parts = math.ceil(num / _MAX_ADAPTED)
    size, parts = math.ceil(num / num_parts), []
    for _ in range(num_parts):  # mutant: adapted-to-ten-thousand-draws
        found = adapted_draws(proxy, main, own, x, size)
        theta, log_q = found.theta[1:], found.log_potential(proxy.inverse_temperature)[1:]
        with embedded_once(main, x):
            log_w = log_target(theta, log_q) - found.log_m[1:]
        parts.append((theta, log_w.nan_to_num(nan=-torch.inf, neginf=-torch.inf)))
    return Candidates(*(torch.cat(part) for part in zip(*parts)))


def or_adapted(found: Candidates, adapt: Callable[[], Candidates]) -> Candidates:
    """The main's candidates at one x, or adapted ones where the main's are unreliable.

    Args:
        found: Candidates of the main.
        adapt: Draws adapted candidates.

    Warns:
        JeffreysWarning: If the main's candidates are unreliable: main and proxy disagree.
    """
    (quality,) = found.quality
    if quality.reliable:
        return found
    adapted = adapt()  # mutant: candidates-never-adapted
    if not adapted.quality[0].reliable:  # mutant: adapted-to-nothing
        best = max((found, adapted), key=lambda draws: draws.quality[0].effective_draws)
        warn_if_unreliable(best.quality)
        return best
    warn(
        f"Main and proxy disagree at this observation: {quality.num_candidates:,} draws of the "
        f"main are worth {quality.effective_draws:.0f} of the corrected posterior (Pareto k̂ "
        f"{quality.pareto_k:.2f}). They were replaced by draws of a proposal that was adapted to "
        f"the proxy, worth {adapted.quality[0].effective_draws:.0f}. Held-out "
        "simulations like this observation would show which of the two is right: see "
        "training_report, simulate further rounds here, or ask misspecification_test() whether "
        "x is like the simulations.",
    )
    return adapted


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

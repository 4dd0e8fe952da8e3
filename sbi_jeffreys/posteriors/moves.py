r"""Resample–move: Metropolis steps that spread copies of the same few candidates over the target.

Where few candidates carry the weight, resampling returns each of them many times. Steps of Markov
chains that leave the target invariant make different draws of the copies, and take the draws to
where the proposal of the candidates had next to no mass (Gilks & Berzuini 2001). Steps are those of
differential evolution (ter Braak 2006): a draw moves by a multiple of the difference of two others,
which has the scale and the correlations of the target without any tuning. The draws are moved in
two halves, each by differences of the other, which does not change meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sbi_jeffreys.posteriors.candidates import Candidates, resample

__all__ = ["distinct_draws", "moved"]

LogTarget = Callable[[Tensor], Tensor]

_MOST_COPIES = 0.1  # share of copies among the draws that is left
_FEWEST = 200  # draws that are moved together, however few are asked for
_ACCEPTED = 10.0  # accepted steps per draw, on average, after which the draws are left
_FEWEST_STEPS, _MOST_STEPS, _MOST_EVALUATIONS = 5, 60, 2_000_000
_JUMP_EVERY = 5  # every so many steps, a step is a whole difference: it jumps between modes
_JITTER = 1e-3  # noise of a step in standard deviations: differences of few points span too little


def distinct_draws(
    found: Candidates, num: int, log_target: LogTarget, batch: int, show_progress_bars: bool = False
) -> Tensor:
    """Resampled candidates at one x, moved if more than a tenth of them are copies of another one.

    Args:
        found: Candidates at one observation.
        num: How many draws.
        log_target: Unnormalised log density of θ `(N, 1, D)`, `(N, 1)`; −∞ or NaN where there is no
            mass.
        batch: Most θ per call of `log_target`.
        show_progress_bars: Whether to show progress over the steps.

    Returns:
        Shape `(num, D)`.
    """
    draws = resample(found, max(num, _FEWEST))[:, 0]  # mutant: few-draws-moved-among-themselves

    def in_batches(theta: Tensor) -> Tensor:
        return torch.cat([log_target(part.unsqueeze(1))[:, 0] for part in theta.split(batch)])

    copies = 1.0 - len(draws.unique(dim=0)) / len(draws)
    if copies > _MOST_COPIES:  # mutant: copies-kept
        draws = moved(draws, in_batches, show_progress_bars)
    return draws[:num]


@torch.no_grad()
def moved(draws: Tensor, log_target: LogTarget, show_progress_bars: bool = False) -> Tensor:
    """Draws after Metropolis steps: until each was accepted ten times, on average, or sixty steps.

    There are fewer steps where there are more than 33,000 draws, but at least five.

    Args:
        draws: At least 4 draws at which the target has mass, `(N, D)`.
        log_target: Unnormalised log density of θ `(N, D)`, shape `(N,)`.
        show_progress_bars: Whether to show progress over the steps.

    Returns:
        Shape `(N, D)`.
    """
    draws, spread = draws.clone(), draws.std(dim=0)
    log_densities, accepted = log_target(draws), 0.0
    num_steps = max(_FEWEST_STEPS, min(_MOST_STEPS, _MOST_EVALUATIONS // len(draws)))
    steps = tqdm(range(num_steps), desc="Moving copies", disable=not show_progress_bars)
    for step in steps:
        # In a random order, or copies next to each other would be in the same half.
        halves = torch.randperm(len(draws), device=draws.device).tensor_split(2)
        whole = step % _JUMP_EVERY == _JUMP_EVERY - 1
        for own, others in (halves, halves[::-1]):
            proposed = draws[own] + _steps(draws[others], len(own), whole)
            proposed += _JITTER * spread * torch.randn_like(proposed)
            log_proposed = log_target(proposed)
            # mutant: every-move-accepted
            accept = torch.rand_like(log_proposed).log() < log_proposed - log_densities[own]
            draws[own] = torch.where(accept.unsqueeze(1), proposed, draws[own])
            log_densities[own] = torch.where(accept, log_proposed, log_densities[own])
            accepted += float(accept.sum()) / len(draws)
        if accepted >= _ACCEPTED:
            break
    steps.close()
    return draws


def _steps(others: Tensor, num: int, whole: bool) -> Tensor:
    """Multiples of `num` differences of two of the draws `(M, D)`, whole ones or shorter."""
    dim = others.shape[1]
    rows = torch.randint(len(others), (2, num), device=others.device)
    differences = others[rows[0]] - others[rows[1]]
    if whole:
        return differences
    return 2.38 / math.sqrt(2 * dim) * torch.rand_like(differences[:, :1]).sqrt() * differences

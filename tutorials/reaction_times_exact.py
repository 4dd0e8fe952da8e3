"""Draw from the exact posteriors of `06_reaction_times.ipynb`, for the notebook to compare with.

    python tutorials/reaction_times_exact.py

The density of the first passage is that of Navarro & Fuss (2009), for a start midway between the
bounds. The posteriors of the fourteen people are sampled by adaptive importance sampling: a normal
proposal is fitted to weighted draws several times over, and the last weights' effective sample
sizes, printed and checked, say whether that worked. Prior and data are the notebook's own cells.
Writes 1,000 draws per person to `data/reaction_times_exact.npz`. Less than a minute.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from execute import FOLDER, names_of
from torch import Tensor
from torch.distributions import MultivariateNormal

NUM_CANDIDATES, NUM_ROUNDS, NUM_SAMPLES = 20_000, 8, 1_000
SMALLEST_SIZE = 0.5  # effective sample size over candidates


def log_first_passage(time: Tensor, drift: Tensor, distance: Tensor, sign: Tensor) -> Tensor:
    """Log density of meeting the upper (sign 1) or lower (sign −1) of two bounds at a time.

    A series for small times and one for large times are equal; each is used where it converges
    fast.
    """
    scaled = (time / distance**2).clamp(min=1e-6)[..., None]
    k = torch.arange(-3.0, 4.0)
    small = ((0.5 + 2 * k) * torch.exp(-((0.5 + 2 * k) ** 2) / (2 * scaled))).sum(-1)
    small = small / (2 * math.pi * scaled[..., 0] ** 3).sqrt()
    j = torch.tensor([1.0, 3.0, 5.0])
    waves = j * torch.exp(-(j**2) * math.pi**2 * scaled / 2) * torch.tensor([1.0, -1.0, 1.0])
    standard = torch.where(scaled[..., 0] < 0.3, small, math.pi * waves.sum(-1)).clamp(min=1e-30)
    return standard.log() - 2 * distance.log() + sign * drift * distance / 2 - drift**2 * time / 2


def log_likelihood(theta: Tensor, rt: Tensor, correct: Tensor, conflict: Tensor) -> Tensor:
    """Log density of one person's trials `(T,)` at every θ `(N, 4)`."""
    drift = torch.where(conflict, theta[:, 1:2], theta[:, :1])
    time = rt - theta[:, 3:4]
    sign = torch.where(correct, 1.0, -1.0)
    log_density = log_first_passage(time.clamp(min=1e-4), drift, theta[:, 2:3], sign)
    return torch.where(time > 0, log_density, -torch.inf).sum(1)


def exact_posterior(prior: Any, trials: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, float]:
    """Draws from one person's posterior, and the effective sample size that they rest on."""
    rt = trials[0]
    mean = torch.stack([torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1.5), 0.9 * rt.min()])
    covariance = torch.diag(torch.tensor([1.0, 1.0, 0.4, 0.05]) ** 2)
    weights = candidates = torch.empty(0)
    for round_ in range(NUM_ROUNDS):
        proposal = MultivariateNormal(mean, 1.3 * covariance + 1e-7 * torch.eye(4))
        candidates = proposal.sample((NUM_CANDIDATES,))
        candidates = candidates[prior.support.check(candidates)]
        log_likelihoods = [log_likelihood(part, *trials) for part in candidates.split(1000)]
        log_weights = torch.cat(log_likelihoods) - proposal.log_prob(candidates)
        temperature = max(1.0, 2.0 ** (4 - round_))  # first rounds look further round
        weights = (log_weights / temperature).softmax(0)
        mean = weights @ candidates
        covariance = (weights[:, None] * (candidates - mean)).T @ (candidates - mean)
    chosen = weights.multinomial(NUM_SAMPLES, replacement=True)
    return candidates[chosen], float(1 / weights.square().sum() / len(weights))


def main() -> None:
    """Sample, check, write."""
    torch.manual_seed(0)
    model = names_of("06_reaction_times.ipynb", "simulate")
    samples = []
    for person, mask in enumerate(model["people_mask"]):
        names = ("people_rt", "people_correct", "people_conflict")
        drawn, size = exact_posterior(model["prior"], tuple(model[n][person][mask] for n in names))
        means = ", ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(drawn.mean(0), drawn.std(0)))
        print(f"person {person}: {means}   effective sample size {size:.2f}", flush=True)
        if size < SMALLEST_SIZE:
            raise RuntimeError("The weights have degenerated; raise NUM_ROUNDS.")
        samples.append(drawn)
    stacked = torch.stack(samples, dim=1)  # draws, people, parameters
    np.savez_compressed(FOLDER / "data" / "reaction_times_exact.npz", samples=stacked.numpy())


if __name__ == "__main__":
    main()

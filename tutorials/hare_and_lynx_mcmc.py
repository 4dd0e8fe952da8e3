"""Sample the exact posterior of `05_hare_and_lynx.ipynb` by MCMC, for the notebook to compare with.

    python tutorials/hare_and_lynx_mcmc.py

Differential evolution MCMC (ter Braak, 2006) in the logarithms of the parameters: 192 chains in two
halves, each of which proposes along differences of two members of the other half. Prior, solver and
data are the notebook's own cells. Prints R-hat and effective sample sizes, fails if they are not
good enough, and writes 4,000 samples to `data/hare_and_lynx_mcmc.npz`. Some five minutes on one
core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from execute import FOLDER, names_of
from torch import Tensor
from torch.distributions import Normal

NUM_CHAINS, NUM_STEPS, BURN_IN, THIN = 192, 4_000, 1_000, 5
NUM_SAMPLES = 4_000
PUBLISHED_MEANS = [0.55, 0.028, 0.80, 0.024, 34.0, 5.9, 0.25, 0.25]  # of Stan's case study


def log_posterior(model: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """The unnormalised log density of y = log θ."""
    data = model["x_o"].reshape(2, 1, 21)

    def density(y: Tensor) -> Tensor:
        theta = y.exp()
        noise = theta[:, 6:].T[..., None]
        law = Normal(model["log_populations"](theta), noise, validate_args=False)
        log_likelihood = law.log_prob(data).sum((0, 2))
        value = log_likelihood + model["prior"].log_prob(theta) + y.sum(1)  # θ to log θ
        return torch.where(value.isfinite(), value, -torch.inf)

    return density


def run_chains(density: Callable[[Tensor], Tensor]) -> Tensor:
    """Thinned states of all chains after the burn-in, `(steps, chains, 8)`."""
    y = torch.tensor(PUBLISHED_MEANS).log() + 0.1 * torch.randn(NUM_CHAINS, 8)
    log_p, kept = density(y), []
    half = NUM_CHAINS // 2
    for step in range(NUM_STEPS):
        gamma = 1.0 if step % 10 == 0 else 2.38 / (2 * 8) ** 0.5  # a 1 lets chains change modes
        for first in (0, 1):
            moved = torch.arange(first, NUM_CHAINS, 2)
            others = y[torch.arange(1 - first, NUM_CHAINS, 2)]
            pairs = torch.rand(half, half).topk(2, dim=1).indices
            along = others[pairs[:, 0]] - others[pairs[:, 1]]
            proposed = y[moved] + gamma * along + 1e-4 * torch.randn(half, 8)
            log_p_proposed = density(proposed)
            accepted = torch.rand(half).log() < log_p_proposed - log_p[moved]
            y[moved[accepted]] = proposed[accepted]
            log_p[moved[accepted]] = log_p_proposed[accepted]
        if step >= BURN_IN and step % THIN == 0:
            kept.append(y.clone())
        if step % 1000 == 0:
            print(f"step {step:,}", flush=True)
    return torch.stack(kept)


def split_r_hat(chains: Tensor) -> tuple[Tensor, Tensor]:
    """Split R-hat and a conservative effective sample size, from the spread of chains' means."""
    steps = len(chains) // 2
    halves = torch.cat([chains[:steps], chains[steps : 2 * steps]], dim=1)
    within, between = halves.var(0).mean(0), halves.mean(0).var(0)
    r_hat = ((steps - 1) / steps + between / within).sqrt()
    return r_hat, (halves.shape[1] * within / between).clamp(max=chains[..., 0].numel())


def main() -> None:
    """Sample, check, write."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = names_of("05_hare_and_lynx.ipynb", "simulate")
    with torch.no_grad():
        chains = run_chains(log_posterior(model))
    r_hat, size = split_r_hat(chains)
    samples = chains.flatten(0, 1).exp()
    for k, name in enumerate(model["names"]):
        mean, std = samples[:, k].mean(), samples[:, k].std()
        print(f"{name:15} {mean:.4f} ± {std:.4f}   R-hat {r_hat[k]:.3f}   ESS {size[k]:,.0f}")
    if r_hat.max() > 1.02 or size.min() < NUM_SAMPLES:
        raise RuntimeError("The chains have not converged; raise NUM_STEPS.")
    chosen = samples[torch.randperm(len(samples))[:NUM_SAMPLES]]
    np.savez_compressed(FOLDER / "data" / "hare_and_lynx_mcmc.npz", samples=chosen.numpy())


if __name__ == "__main__":
    main()

"""Short Markov chains that take pairs (θ̃, x̃) from the proposals of later rounds to the prior.

For θ̃ of the rounds, which follow the density p̃ of their proposals, and x̃ ∼ ℓ_ψ(·|θ̃), θ̃ is an exact
draw of the posterior under p̃ in place of the prior p. Started there, a chain whose target is
q_ψ(θ|x̃) ∝ p(θ) ℓ_ψ(x̃|θ) has to make up for the difference of p̃ and p only. It needs no main and no
normaliser, it cannot miss where the posterior is, and one draw for each x̃ is enough.

There are two kinds of Metropolis steps. Most move θ by a multiple of the difference of two of the
rounds' θ, which has the scale and the correlations of what the rounds know (differential evolution
with an archive; ter Braak & Vrugt 2008, doi 10.1007/s11222-008-9104-9). Every third step proposes
a draw from a mixture of the prior and of kernel densities of the rounds' θ, which moves θ between
modes in the proportions of q_ψ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sbi_jeffreys.proxies.base import EmpiricalPrior, Proxy

__all__ = ["MixtureOfRounds", "moved_to_prior"]

_INDEPENDENT_EVERY = 3  # every so many steps, the proposal does not depend on where θ is
_FEWEST, _PER_DIMENSION, _MOST = 32, 4, 64  # steps: some, and more with every parameter
_FIRST_SCALE = 0.3  # of a difference
_LONGER, _SHORTER = 1.3, 0.84  # factors of a step's scale: four in ten steps will be accepted
_AT_ONCE, _MOST_AT_ONCE = 20_000_000, 4096  # numbers of x in memory; observations at once


class MixtureOfRounds:
    """The prior and a kernel density of each round's θ, in equal parts.

    Args:
        proxy: Supplies the prior.
        rounds: θ of each round, `(N, D)` each.
    """

    def __init__(self, proxy: Proxy, rounds: Sequence[Tensor]) -> None:
        self._proxy = proxy
        self._kernels = [EmpiricalPrior(theta) for theta in rounds]

    def sample(self, num: int) -> Tensor:
        """Draws `(num, D)`, some of which may lie outside the prior."""
        which = torch.randint(1 + len(self._kernels), (num,))
        theta = self._proxy.sample_prior(num).to(self._kernels[0].centres)
        for k, kernel in enumerate(self._kernels):
            rows = (which == k + 1).nonzero().squeeze(-1).to(theta.device)
            theta[rows] = kernel.sample(torch.Size((len(rows),)))
        return theta

    def log_prob(self, theta: Tensor) -> Tensor:
        """Log density up to a constant, `(*B,)` for θ `(*B, D)`."""
        log_prior = self._proxy.log_prior(theta)
        densities = [log_prior, *(kernel.log_prob(theta) for kernel in self._kernels)]
        return torch.logsumexp(torch.stack(densities), dim=0)


@torch.no_grad()
def moved_to_prior(
    proxy: Proxy,
    theta: Tensor,
    x: Tensor,
    mixture: MixtureOfRounds,
    archive: Tensor,
    num: int = 1,
    show_progress_bars: bool = False,
) -> Tensor:
    """Draws of the proxy's posteriors, from pairs whose θ follow the rounds' proposals.

    Args:
        proxy: A fitted proxy, at its temperature.
        theta: θ̃ of the pairs, `(N, D)`.
        x: x̃ of the pairs, `(N, *x_shape)`.
        mixture: What steps between modes are drawn from.
        archive: θ whose differences the other steps are multiples of, `(M, D)`.
        num: K, chains for each pair.
        show_progress_bars: Whether to show progress.

    Returns:
        Shape `(K, N, D)`.
    """
    size = max(1, min(_MOST_AT_ONCE, _AT_ONCE // (num * x[0].numel())))
    num_steps = min(_MOST, _FEWEST + _PER_DIMENSION * theta.shape[-1])
    parts = []
    total = math.ceil(len(theta) / size) * num_steps
    with tqdm(total=total, desc="Moving pairs", disable=not show_progress_bars) as bar:
        for some, observed in zip(theta.split(size), x.split(size)):
            start = some.expand(num, -1, -1)
            parts.append(_moved(proxy, start, observed, mixture, archive, num_steps, bar))
    return torch.cat(parts, dim=1)


def _moved(
    proxy: Proxy,
    theta: Tensor,
    x: Tensor,
    mixture: MixtureOfRounds,
    archive: Tensor,
    num_steps: int,
    bar: tqdm,
) -> Tensor:
    """θ `(K, B, D)` at observations `(B, *x_shape)` after all steps, which the bar counts."""
    shape = theta.shape[:2]
    log_target = proxy.log_potential(theta, x)
    scale = torch.full((*shape, 1), _FIRST_SCALE).to(theta)
    for step in range(num_steps):  # mutant: pairs-of-proposals-kept
        independent = step % _INDEPENDENT_EVERY == 0  # mutant: chains-never-jump
        if independent:
            proposed = mixture.sample(shape.numel()).reshape(theta.shape)
            # mutant: jumps-by-the-target-alone
            log_odds = mixture.log_prob(theta) - mixture.log_prob(proposed)
        else:
            rows = torch.randint(len(archive), (2, *shape), device=archive.device)
            proposed = theta + scale * (archive[rows[0]] - archive[rows[1]])
            log_odds = torch.zeros_like(log_target)
        log_proposed = proxy.log_potential(proposed, x)
        log_odds = log_odds + log_proposed - log_target
        # mutant: steps-of-chains-always-accepted
        accept = torch.rand_like(log_odds).log() < log_odds  # not where either is NaN
        theta = torch.where(accept.unsqueeze(-1), proposed, theta)
        log_target = torch.where(accept, log_proposed, log_target)
        # A scale that depended on where the chain is would change the target: it settles first.
        if 2 * step < num_steps and not independent:
            scale = scale * torch.where(accept, _LONGER, _SHORTER).unsqueeze(-1)
        bar.update()
    return theta

r"""The distribution of θ over rounds of truncated proposals (TSNPE; Deistler et al. 2022).

A truncated proposal is the prior cut off at a region, p(θ) 1_r(θ) / Z_r, and the main is trained by
the loss of the first round. So it learns the posterior under the mixture of all rounds,

    p̄(θ) = Σ_r N_r/N · p(θ) 1_r(θ) / Z_r,

which inside all regions is the posterior up to a constant. A proxy that the main is compared with,
and that generates pairs for it, needs the same p̄ in place of the prior.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy

import torch
from sbi.utils import RestrictedPrior
from torch import Tensor
from torch.distributions import Distribution, constraints

from sbi_jeffreys.networks.prior_space import inside_support
from sbi_jeffreys.proxies.base import EmpiricalPrior, Proxy

__all__ = ["TruncatedRounds", "of_truncated_rounds"]

_DRAWS = 8_192  # draws of a kernel density that estimate Z_r
_PER_SAMPLE, _LEAST = 8, 256  # candidates for each draw of a truncated prior, and in all
_CHUNK = 50_000  # candidates at once: bounds memory


class TruncatedRounds(Distribution):
    """The mixture of a prior and of truncations of it, in proportion to their simulations.

    Args:
        prior: The prior p(θ).
        rounds: For each round its truncated prior, or None for the prior itself, and its θ
            `(N_r, D)`. A truncated prior is sampled, and its Z_r estimated, by importance sampling
            from a kernel density of its θ, because rejecting draws of the prior can take forever.
    """

    arg_constraints: dict = {}  # noqa: RUF012 - torch's protocol
    has_rsample = False

    def __init__(
        self, prior: Distribution, rounds: Sequence[tuple[RestrictedPrior | None, Tensor]]
    ) -> None:
        self.prior = prior
        sizes = torch.tensor([float(len(theta)) for _, theta in rounds])
        self.shares = sizes / sizes.sum()
        parts = [None if part is None else _Truncated(prior, part, theta) for part, theta in rounds]
        # A region without mass near its own θ, as where the function that defines it has changed,
        # is unusable: the prior takes its place.
        self.parts = [part if part and math.isfinite(part.log_z) else None for part in parts]
        super().__init__(event_shape=torch.Size((rounds[0][1].shape[1],)), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The prior's support."""
        return self.prior.support  # type: ignore[return-value]

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draws of shape `(*sample_shape, D)`."""
        num = torch.Size(sample_shape).numel()
        counts = torch.multinomial(self.shares, max(1, num), replacement=True).bincount(
            minlength=len(self.parts)
        )
        drawn = [
            (self.prior if part is None else part).sample(torch.Size((int(count),)))
            for part, count in zip(self.parts, counts)
            if count > 0
        ]
        theta = torch.cat(drawn)[torch.randperm(int(counts.sum()))[:num]]
        return theta.reshape(*sample_shape, theta.shape[-1])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, shape `(*B,)` for `(*B, D)`."""
        flat = value.reshape(-1, value.shape[-1])
        plain = self.prior.log_prob(flat)
        logs = [
            share.log().to(plain) + (plain if part is None else part.log_prob(flat, plain))
            for part, share in zip(self.parts, self.shares)
        ]
        return torch.logsumexp(torch.stack(logs), dim=0).reshape(value.shape[:-1])


class _Truncated:
    """One truncated prior, p(θ) 1_r(θ) / Z_r."""

    def __init__(self, prior: Distribution, restricted: RestrictedPrior, theta: Tensor) -> None:
        self.prior, self.restricted, self.density = prior, restricted, EmpiricalPrior(theta)
        _, log_weights = self._candidates(_DRAWS)
        self.log_z = float(torch.logsumexp(log_weights, dim=0)) - math.log(_DRAWS)

    def log_prob(self, theta: Tensor, log_prior: Tensor) -> Tensor:
        """Log density at θ `(N, D)`, given the prior's."""
        inside = torch.isfinite(self.restricted.log_prob(theta, norm_restricted_prior=False))
        return torch.where(inside.to(log_prior.device), log_prior - self.log_z, -torch.inf)

    def sample(self, shape: torch.Size) -> Tensor:
        """Draws of shape `(num, D)`."""
        num = shape.numel()
        theta, log_weights = self._candidates(max(_LEAST, _PER_SAMPLE * num))
        if not bool(torch.isfinite(log_weights).any()):  # mutant: no-candidate-in-a-thin-region
            theta = self.density.centres  # none inside: the round's own θ are draws, too
            log_weights = theta.new_zeros(len(theta))
        return theta[torch.multinomial(log_weights.softmax(0), num, replacement=True)]

    @torch.no_grad()
    def _candidates(self, num: int) -> tuple[Tensor, Tensor]:
        """Draws of the kernel density, and their log weights; −∞ outside the region."""
        thetas, logs = [], []
        for start in range(0, num, _CHUNK):
            theta = self.density.sample(torch.Size((min(_CHUNK, num - start),)))
            log_weights = torch.full((len(theta),), -torch.inf).to(theta)
            rows = inside_support(self.prior, theta).nonzero()[:, 0]
            target = self.restricted.log_prob(theta[rows], norm_restricted_prior=False)
            log_weights[rows] = target.to(theta) - self.density.log_prob(theta[rows])
            thetas.append(theta)
            logs.append(log_weights)
        return torch.cat(thetas), torch.cat(logs)


def of_truncated_rounds(proxy: Proxy, prior: TruncatedRounds) -> Proxy:
    """A copy of the proxy, with the distribution of θ over the rounds as its prior."""
    twin = copy(proxy)
    for part in twin.modules():
        if isinstance(part, Proxy):
            part.prior = prior
    return twin

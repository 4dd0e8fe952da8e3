"""Mixtures of multivariate Student-t distributions: the proposals of the reference samplers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_EM_STEPS = 20


@dataclass
class StudentMixture:
    """K multivariate t distributions in D dimensions, float64.

    Attributes:
        log_weights: Log mixture weights, `(K,)`.
        locs: Centres, `(K, D)`.
        scale_trils: Cholesky factors of the scale matrices, `(K, D, D)`.
        df: Degrees of freedom, common to all.
    """

    log_weights: Tensor
    locs: Tensor
    scale_trils: Tensor
    df: float

    @classmethod
    def single(cls, loc: Tensor, covariance: Tensor, df: float) -> StudentMixture:
        """One t distribution with centre `(D,)` and scale matrix `(D, D)`."""
        tril = torch.linalg.cholesky(covariance)
        return cls(torch.zeros(1, dtype=loc.dtype), loc[None], tril[None], df)

    @classmethod
    def fit(
        cls, draws: Tensor, log_weights: Tensor, num_components: int, df: float
    ) -> StudentMixture:
        """Fit to draws `(N, D)` by EM for Gaussians, whose covariances become scale matrices.

        The log weights `(N,)` need no normalisation. A t distribution with the covariance as its
        scale is wider than the target, as a proposal should be.
        """
        weights = torch.softmax(log_weights, 0)
        centre = weights @ draws
        overall = _covariance(draws, weights, centre)
        # The ridge is relative to all draws, so that no component can collapse to a point.
        ridge = 1e-3 * torch.diag(overall.diagonal()) + 1e-14 * torch.eye(len(overall)).double()
        starts = torch.multinomial(weights, num_components, replacement=True)
        locs = draws[starts] if num_components > 1 else centre[None]
        mixture = cls(
            torch.full((num_components,), -math.log(num_components), dtype=draws.dtype),
            locs,
            torch.linalg.cholesky(overall + ridge).expand(num_components, -1, -1),
            math.inf,
        )
        for _ in range(_EM_STEPS if num_components > 1 else 1):
            mixture = mixture._em_step(draws, weights, ridge)
        return cls(mixture.log_weights, mixture.locs, mixture.scale_trils, df)

    def sample(self, sample_shape: torch.Size) -> Tensor:
        """Draws, `(N, D)` for a `sample_shape` of `(N,)`."""
        count = sample_shape.numel()
        component = torch.multinomial(self.log_weights.exp(), count, replacement=True)
        noise = torch.randn(count, self.locs.shape[-1], dtype=self.locs.dtype)
        gamma = torch.distributions.Gamma(
            torch.tensor(0.5 * self.df, dtype=noise.dtype), torch.tensor(0.5, dtype=noise.dtype)
        )
        noise = noise * torch.sqrt(self.df / gamma.sample(torch.Size((count, 1))))
        return self.locs[component] + torch.einsum("nij,nj->ni", self.scale_trils[component], noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, `(N, D)` → `(N,)`."""
        return torch.logsumexp(self._joint_log_prob(value), -1)

    def _joint_log_prob(self, value: Tensor) -> Tensor:
        """Log of weight times density per component: `(N, D)` → `(N, K)`."""
        dim = value.shape[-1]
        residual = (value[:, None] - self.locs).permute(1, 2, 0)  # (K, D, N)
        solved = torch.linalg.solve_triangular(self.scale_trils, residual, upper=False)
        squared = solved.square().sum(1).T
        log_det = self.scale_trils.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        if math.isinf(self.df):
            log_density = -0.5 * squared - 0.5 * dim * math.log(2 * math.pi)
        else:
            log_norm = math.lgamma(0.5 * (self.df + dim)) - math.lgamma(0.5 * self.df)
            log_norm -= 0.5 * dim * math.log(self.df * math.pi)
            log_density = log_norm - 0.5 * (self.df + dim) * torch.log1p(squared / self.df)
        return self.log_weights + log_density - log_det

    def _em_step(self, draws: Tensor, weights: Tensor, ridge: Tensor) -> StudentMixture:
        joint = self._joint_log_prob(draws)
        responsibility = weights[:, None] * torch.softmax(joint, -1)  # (N, K)
        mass = responsibility.sum(0).clamp_min(1e-12)
        locs = (responsibility.T @ draws) / mass[:, None]
        covariances = torch.stack(
            [
                _covariance(draws, responsibility[:, k] / mass[k], locs[k]) + ridge
                for k in range(len(mass))
            ]
        )
        trils = torch.linalg.cholesky(covariances)
        return StudentMixture(torch.log(mass / mass.sum()), locs, trils, self.df)


def _covariance(draws: Tensor, weights: Tensor, centre: Tensor) -> Tensor:
    """Weighted covariance of `(N, D)` about `(D,)`, weights `(N,)` summing to one."""
    residual = draws - centre
    return residual.T @ (weights[:, None] * residual)

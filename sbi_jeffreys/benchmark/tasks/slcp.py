"""SLCP: a simple likelihood with a complex posterior (Lueckmann et al. 2021, T.3, T.4).

From Papamakarios et al. (2019), "Sequential neural likelihood". The distractors follow
sbibm's recipe, numpy's legacy generator at seed 42, without loading its files.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from sbi.utils import BoxUniform
from torch import Tensor

from ._registry import register_task
from ._slcp_reference import sample_slcp_posterior
from .base import Task

_BOUND = 3.0
_NUM_POINTS = 4
_JITTER = 1e-6  # added to both variances, as in sbibm, so that θ₃ = 0 stays simulable
_NUM_DISTRACTORS = 92
_NUM_COMPONENTS = 20
_DF = 2.0
_DISTRACTOR_SEED = 42


@register_task
class SLCP(Task):
    """Four points of a 2-D Gaussian with mean (θ₁, θ₂) and scales θ₃², θ₄², correlation tanh θ₅.

    The prior is U(−3, 3)⁵. Likelihood and prior are even in θ₃ and θ₄: four modes.
    """

    name = "slcp"
    dim_theta = 5
    dim_x = 2 * _NUM_POINTS

    def __init__(self) -> None:
        self.prior = BoxUniform(-_BOUND * torch.ones(5), _BOUND * torch.ones(5))

    def simulate(self, theta: Tensor) -> Tensor:
        """θ `(N, 5)` → x `(N, 8)`: point by point, both coordinates."""
        var_1, var_2, cov = _covariance(theta.double())
        first, second = torch.randn(2, len(theta), _NUM_POINTS, dtype=torch.float64)
        std_1 = torch.sqrt(var_1)
        std_2_given_1 = torch.sqrt(var_2 - cov**2 / var_1)
        x_1 = theta[:, :1] + std_1[:, None] * first
        x_2 = theta[:, 1:2] + (cov / std_1)[:, None] * first + std_2_given_1[:, None] * second
        return torch.stack((x_1, x_2), -1).flatten(1).to(theta.dtype)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        params = theta.double()
        var_1, var_2, cov = _covariance(params)
        residual = x.double().unflatten(-1, (_NUM_POINTS, 2)) - params[..., None, :2]
        r_1, r_2 = residual[..., 0], residual[..., 1]
        sum_11, sum_22, sum_12 = (r_1**2).sum(-1), (r_2**2).sum(-1), (r_1 * r_2).sum(-1)
        det = var_1 * var_2 - cov**2
        quadratic = (var_2 * sum_11 - 2 * cov * sum_12 + var_1 * sum_22) / det
        log_norm = _NUM_POINTS * (math.log(2 * math.pi) + 0.5 * torch.log(det))
        return (-0.5 * quadratic - log_norm).to(theta.dtype)

    def sample_reference(self, x: Tensor, num_samples: int) -> Tensor:
        points = self.check_observation(x).reshape(_NUM_POINTS, 2)
        return sample_slcp_posterior(points, num_samples, _BOUND, _JITTER, self.name)

    def modes(self, theta: Tensor, x: Tensor) -> Tensor:
        """The signs of (θ₃, θ₄) as 0 to 3, negative first: `(N, 5)` → `(N,)`."""
        return 2 * (theta[:, 2] >= 0).long() + (theta[:, 3] >= 0).long()


@register_task
class SLCPDistractors(SLCP):
    """SLCP hidden among 92 outputs that carry no information about θ.

    The distractors come from a mixture of 20 multivariate t distributions with two degrees
    of freedom; all 100 outputs are permuted, always in the same way.
    """

    name = "slcp_distractors"
    dim_x = 2 * _NUM_POINTS + _NUM_DISTRACTORS

    def simulate(self, theta: Tensor) -> Tensor:
        noise = _sample_distractors(len(theta)).to(theta.dtype)
        return torch.cat((super().simulate(theta), noise), 1)[:, _distractors()[2]]

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """log p(x|θ) but for a constant, `(*B, 5)`, `(*B, 100)` → `(*B,)`.

        The constant is the distractors' log density, which is the same for every θ. Outputs in
        float32 do not determine it: the scale matrices have condition numbers up to 1e18.
        """
        return super().log_likelihood(theta, _informative(x))

    def sample_reference(self, x: Tensor, num_samples: int) -> Tensor:
        points = _informative(self.check_observation(x)).reshape(_NUM_POINTS, 2)
        return sample_slcp_posterior(points, num_samples, _BOUND, _JITTER, self.name)


def _covariance(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both variances and the covariance, each `(*B,)`, of θ `(*B, 5)`."""
    scale_1, scale_2 = theta[..., 2] ** 2, theta[..., 3] ** 2
    covariance = torch.tanh(theta[..., 4]) * scale_1 * scale_2
    return scale_1**2 + _JITTER, scale_2**2 + _JITTER, covariance


@lru_cache(maxsize=1)
def _distractors() -> tuple[Tensor, Tensor, Tensor]:
    """Centres `(20, 92)`, lower-triangular scales `(20, 92, 92)`, permutation `(100,)`."""
    rng, dim = np.random.RandomState(_DISTRACTOR_SEED), _NUM_DISTRACTORS
    locs = 15.0 * rng.normal(size=(_NUM_COMPONENTS, dim))
    scales = np.empty((_NUM_COMPONENTS, dim, dim))
    for component in scales:
        component[...] = np.tril(rng.normal(size=(dim, dim)))
        component[np.diag_indices(dim)] += np.exp(rng.normal(size=dim))
    permutation = rng.permutation(dim + 2 * _NUM_POINTS)
    return torch.from_numpy(locs), torch.from_numpy(3.0 * scales), torch.from_numpy(permutation)


def _sample_distractors(count: int) -> Tensor:
    """`(count, 92)`, float64."""
    locs, scales, _ = _distractors()
    component = torch.randint(0, _NUM_COMPONENTS, (count,))
    noise = torch.randn(count, _NUM_DISTRACTORS, dtype=torch.float64)
    # χ² with two degrees of freedom is an exponential of mean 2.
    chi_squared = -2.0 * torch.log1p(-torch.rand(count, 1, dtype=torch.float64))
    noise = noise * torch.sqrt(_DF / chi_squared.clamp_min(1e-300))
    draws = locs[component]
    # Component by component: gathering a 92 × 92 matrix per draw would fill the memory.
    for k in range(_NUM_COMPONENTS):
        chosen = component == k
        draws[chosen] += noise[chosen] @ scales[k].T
    return draws


def _informative(x: Tensor) -> Tensor:
    """Undo the permutation and drop the distractors: `(*B, 100)` → `(*B, 8)`."""
    return x[..., _distractors()[2].argsort()[: 2 * _NUM_POINTS]]

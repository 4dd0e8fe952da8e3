"""The SLCP posterior, sampled through its structure.

Given scales and correlation, the mean (θ₁, θ₂) is a Gaussian cut to the prior's box. Integrating
it out leaves a three-dimensional density of (|θ₃|, |θ₄|, θ₅), which a grid covers. The signs of θ₃
and θ₄ are independent and equally likely. Importance weights and rejection correct draws from
grid cells.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool3d

from ._reference import accept_weighted
from ._truncated import INSIDE, log_interval_probability, sample_truncated_normal

_CELLS = 64


class _Marginal:
    """Density of (v₃, v₄, θ₅) with |θ| = bound · v³, for four observed points.

    The cube gives small scales, where the posterior is narrow, their share of the grid's cells.
    """

    def __init__(self, points: Tensor, bound: float, jitter: float) -> None:
        """Reduce points `(n, 2)` to mean and scatter."""
        self.num_points, self.bound, self.jitter = len(points), bound, jitter
        self.mean = points.mean(0)
        centred = points - self.mean
        scatter = centred.T @ centred
        self.s_11, self.s_12, self.s_22 = scatter[0, 0], scatter[0, 1], scatter[1, 1]

    def covariance(self, v_3: Tensor, v_4: Tensor, th_5: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Variances and covariance of one point; broadcasts."""
        scale_1, scale_2 = (self.bound * v_3**3) ** 2, (self.bound * v_4**3) ** 2
        covariance = torch.tanh(th_5) * scale_1 * scale_2
        return scale_1**2 + self.jitter, scale_2**2 + self.jitter, covariance

    def log_density(self, v_3: Tensor, v_4: Tensor, th_5: Tensor) -> Tensor:
        """Log density with the mean integrated over the plane; broadcasts."""
        var_1, var_2, cov = self.covariance(v_3, v_4, th_5)
        det = var_1 * var_2 - cov**2
        quadratic = (var_2 * self.s_11 - 2 * cov * self.s_12 + var_1 * self.s_22) / det
        log_jacobian = 2 * torch.log(v_3) + 2 * torch.log(v_4)
        return log_jacobian - 0.5 * quadratic - 0.5 * (self.num_points - 1) * torch.log(det)

    def log_inside(self, mean: Tensor, variance: Tensor) -> Tensor:
        """Log probability that N(mean, variance) is inside the box; elementwise."""
        return log_interval_probability(mean, variance.sqrt(), -self.bound, self.bound)

    def sample_means(
        self, var_1: Tensor, var_2: Tensor, cov: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw one coordinate of the mean, then the other given the first, each cut to the box.

        Returns θ₁ and θ₂ `(N,)`, and the log importance weight of cutting one after the other.
        """
        n, (mean_1, mean_2) = self.num_points, self.mean
        # The coordinate less likely to be inside goes first: drawn second, its probability
        # would depend wildly on the first, and the weights with it.
        swap = self.log_inside(mean_2, var_2 / n) < self.log_inside(mean_1, var_1 / n)
        mean_a, mean_b = torch.where(swap, mean_2, mean_1), torch.where(swap, mean_1, mean_2)
        var_a, var_b = torch.where(swap, var_2, var_1), torch.where(swap, var_1, var_2)
        low, high = -self.bound, self.bound
        th_a = sample_truncated_normal(mean_a, (var_a / n).sqrt(), low, high)
        given_a = mean_b + cov / var_a * (th_a - mean_a)
        var_given_a = (var_b - cov**2 / var_a) / n
        th_b = sample_truncated_normal(given_a, var_given_a.sqrt(), low, high)
        log_weight = self.log_inside(mean_a, var_a / n) + self.log_inside(given_a, var_given_a)
        return torch.where(swap, th_b, th_a), torch.where(swap, th_a, th_b), log_weight


def sample_slcp_posterior(
    points: Tensor, num_samples: int, bound: float, jitter: float, task: str
) -> Tensor:
    """Independent draws of the SLCP posterior, `(num_samples, 5)`, float32.

    The observed points are `(4, 2)`, float64; the prior is uniform on [−bound, bound]⁵; the
    simulator adds `jitter` to both variances; `task` is the name in error messages.
    """
    marginal = _Marginal(points, bound, jitter)
    log_cells = _log_cell_masses(marginal)
    cells = torch.softmax(log_cells.flatten(), 0)
    log_q = torch.log(cells)

    def propose(count: int) -> tuple[Tensor, Tensor]:
        index = torch.multinomial(cells, count, replacement=True)
        corner = torch.stack(torch.unravel_index(index, log_cells.shape))
        unit = (corner + torch.rand(3, count, dtype=torch.float64)) / _CELLS
        v_3, v_4, th_5 = unit[0], unit[1], bound * (2 * unit[2] - 1)
        th_1, th_2, log_inside = marginal.sample_means(*marginal.covariance(v_3, v_4, th_5))
        log_weights = marginal.log_density(v_3, v_4, th_5) + log_inside - log_q[index]
        signs = 1.0 - 2.0 * torch.randint(0, 2, (2, count), dtype=torch.float64)
        th_3, th_4 = signs[0] * bound * v_3**3, signs[1] * bound * v_4**3
        return torch.stack((th_1, th_2, th_3, th_4, th_5), -1), log_weights

    draws = accept_weighted(propose, num_samples, task, min_efficiency=0.005)
    return draws.clamp(-bound * INSIDE, bound * INSIDE).float()


def _log_cell_masses(marginal: _Marginal) -> Tensor:
    """Unnormalised log proposal mass per cell, `(64, 64, 64)`.

    Each cell takes the largest density among its own and its neighbours' centres, so that the
    proposal nowhere falls far below a density that varies within a cell.
    """
    centres = (torch.arange(_CELLS, dtype=torch.float64) + 0.5) / _CELLS
    v_3, v_4 = centres[:, None, None], centres[None, :, None]
    th_5 = (marginal.bound * (2 * centres - 1))[None, None, :]
    var_1, var_2, _ = marginal.covariance(v_3, v_4, th_5)
    # The mean's probability of being inside the box, as if its coordinates were independent.
    log_inside = marginal.log_inside(marginal.mean[0], var_1 / marginal.num_points)
    log_inside = log_inside + marginal.log_inside(marginal.mean[1], var_2 / marginal.num_points)
    log_density = marginal.log_density(v_3, v_4, th_5) + log_inside
    return max_pool3d(log_density[None], kernel_size=3, stride=1, padding=1)[0]

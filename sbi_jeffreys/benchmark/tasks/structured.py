"""Tasks whose x is not a vector: an image and a set of trials, both with a known likelihood.

They are outside sbibm's ten and outside `TASKS`, whose users rely on vector x; `get_task` and the
benchmark take their names. Each has an embedding net that suits its x and trains on a laptop.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from sbi.neural_nets.embedding_nets import CNNEmbedding, FCEmbedding, PermutationInvariantEmbedding
from sbi.utils import BoxUniform
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Uniform

from ._reference import Proposal, adaptive_importance_sample, largest_temperature
from ._student import StudentMixture
from .base import Task

_LOG_2PI = math.log(2.0 * math.pi)
_NUM_SCOUTS = 50_000
_SCOUT_SAMPLE_SIZE = 100.0


class StructuredTask(Task):
    """A task whose x has more than one axis."""

    @abstractmethod
    def _prior64(self) -> Proposal:
        """The prior in float64: where the reference sampler starts."""

    def sample_reference(self, x: Tensor, num_samples: int) -> Tensor:
        """Samples of p(θ|x) for x of `x_shape` → `(num_samples, D)`.

        Adaptive importance sampling starts from many draws of the prior, tempered until enough of
        them have weight, and rejection makes its draws exact.
        """
        observed, prior = self.check_observation(x), self._prior64()

        def log_target(theta: Tensor) -> Tensor:
            log_prior = prior.log_prob(theta)
            inside = torch.isfinite(log_prior)
            log_prior[inside] += self.log_likelihood(theta[inside], observed)
            return log_prior

        scouts = prior.sample(torch.Size((_NUM_SCOUTS,)))
        log_weights = self.log_likelihood(scouts, observed)
        log_weights = log_weights * largest_temperature(
            lambda temperature: temperature * log_weights, _SCOUT_SAMPLE_SIZE
        )
        # Tempered draws are wider than the posterior, as a first proposal should be.
        start = StudentMixture.fit(scouts, log_weights, num_components=3, df=5.0)
        return adaptive_importance_sample(log_target, start, num_samples, self.name).float()


class BlurredSource(StructuredTask):
    """A 32 × 32 image of a Gaussian blob in white noise: its place, width and brightness.

    x(r) = e^β exp(−|r − c|² / 2e^{2ω}) + 0.5 ε(r), ε ∼ N(0, 1) per pixel, pixel centres evenly
    over [−1, 1]². θ = (c₁, c₂, ω, β), uniform on [−0.8, 0.8]² × [−2.3, −0.9] × [−0.5, 1]: widths
    of 1.6 to 6.5 pixels at one to five noise levels per pixel.
    """

    name = "blurred_source"
    dim_theta = 4
    x_shape = (32, 32)
    dim_x = 32 * 32
    noise = 0.5

    def __init__(self) -> None:
        self._low = torch.tensor([-0.8, -0.8, -2.3, -0.5])
        self._high = torch.tensor([0.8, 0.8, -0.9, 1.0])
        self.prior = BoxUniform(self._low, self._high)

    def simulate(self, theta: Tensor) -> Tensor:
        column, row = self._profiles(theta)
        image = column[..., :, None] * row[..., None, :]
        return image + self.noise * torch.randn_like(image)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        column, row = self._profiles(theta.double())
        pixels = x.double()
        # |x − abᵀ|² = |x|² − 2 aᵀxb + |a|²|b|²: no image is formed per θ.
        along = torch.einsum("...ij,...j->...i", pixels, row)
        cross = (column * along).sum(-1)
        power = column.square().sum(-1) * row.square().sum(-1)
        squared = pixels.square().sum((-2, -1)) - 2.0 * cross + power
        constant = self.dim_x * (math.log(self.noise) + 0.5 * _LOG_2PI)
        return (-0.5 * squared / self.noise**2 - constant).to(theta.dtype)

    def embedding_net(self) -> nn.Module:
        """Two strided convolutions and a linear layer: 20 summaries."""
        return CNNEmbedding(
            input_shape=self.x_shape,
            out_channels_per_layer=[6, 12],
            num_linear_units=50,
            output_dim=20,
            pool_kernel_size=3,
        )

    def _profiles(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """a `(*B, 32)`, with the brightness, and b `(*B, 32)`: the noiseless image is a bᵀ."""
        grid = torch.linspace(-1.0, 1.0, self.x_shape[0], dtype=theta.dtype, device=theta.device)
        scale = theta[..., 2].exp()[..., None]
        column = torch.exp(-0.5 * ((grid - theta[..., 0, None]) / scale).square())
        row = torch.exp(-0.5 * ((grid - theta[..., 1, None]) / scale).square())
        return theta[..., 3].exp()[..., None] * column, row

    def _prior64(self) -> Proposal:
        # Without validation the log density outside is −∞, not an error.
        uniform = Uniform(self._low.double(), self._high.double(), validate_args=False)
        return Independent(uniform, 1, validate_args=False)


class IIDTrials(StructuredTask):
    """Twenty i.i.d. trials of a response time and a score that share a scale.

    Trial j: (y₁, y₂) ∼ N(μ, e^{2ς} [[1, ½], [½, 1]]), x_j = (e^{y₁}, y₂). θ = (μ₁, μ₂, ς) with
    prior N(0, 1)² × N(−0.5, 0.4²).
    """

    name = "iid_trials"
    dim_theta = 3
    x_shape = (20, 2)
    dim_x = 20 * 2
    correlation = 0.5

    def __init__(self) -> None:
        self.prior = MultivariateNormal(*self._prior_moments(torch.float32))

    def simulate(self, theta: Tensor) -> Tensor:
        noise = torch.randn(len(theta), *self.x_shape).to(theta)
        rho = self.correlation
        second = rho * noise[..., 0] + math.sqrt(1 - rho**2) * noise[..., 1]
        noise = torch.stack((noise[..., 0], second), dim=-1)
        y = theta[:, None, :2] + theta[:, 2].exp()[:, None, None] * noise
        return torch.stack((y[..., 0].exp(), y[..., 1]), dim=-1)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """log p(x|θ) for broadcastable `(*B, 3)`, `(*B, 20, 2)` → `(*B,)`; −∞ where e^{y₁} ≤ 0."""
        params, trials = theta.double(), x.double()
        positive = (trials[..., 0] > 0).all(-1)
        log_first = trials[..., 0].clamp_min(1e-300).log()
        scale = params[..., 2].exp()[..., None]
        r_1 = (log_first - params[..., 0, None]) / scale
        r_2 = (trials[..., 1] - params[..., 1, None]) / scale
        rho = self.correlation
        quadratic = (r_1**2 - 2 * rho * r_1 * r_2 + r_2**2) / (1 - rho**2)
        log_det = 4 * params[..., 2, None] + math.log(1 - rho**2)
        log_density = -0.5 * (quadratic + log_det) - _LOG_2PI - log_first
        return torch.where(positive, log_density.sum(-1), -torch.inf).to(theta.dtype)

    def embedding_net(self) -> nn.Module:
        """A net per trial, the mean over trials, and a net on it: 10 summaries.

        Use it with `z_score_x="none"` or `"structured"`: z-scores per trial break its symmetry.
        """
        return PermutationInvariantEmbedding(
            FCEmbedding(input_dim=2, output_dim=20, num_layers=2, num_hiddens=40),
            trial_net_output_dim=20,
            aggregation_fn="mean",
            num_hiddens=40,
            output_dim=10,
        )

    def _prior_moments(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        std = torch.tensor([1.0, 1.0, 0.4], dtype=dtype)
        return torch.tensor([0.0, 0.0, -0.5], dtype=dtype), torch.diag(std**2)

    def _prior64(self) -> Proposal:
        return MultivariateNormal(*self._prior_moments(torch.float64))


#: The structured tasks by name.
STRUCTURED_TASKS: dict[str, type[StructuredTask]] = {
    task.name: task for task in (BlurredSource, IIDTrials)
}

"""Tasks that settings are tuned on, so that the ten benchmark tasks stay unseen.

Each one resembles a family of benchmark tasks (two narrow modes, a linear Gaussian, few i.i.d.
draws with sign symmetries, a generalised linear model, counts from a dynamical system, positive
heavy-tailed output, noise that is not Gaussian) without being any of them. Their likelihoods are
exact; a reference is not needed, because tuning reads the held-out NLL, coverage and leakage.
"""

from __future__ import annotations

import torch
from sbi.utils import BoxUniform
from torch import Tensor
from torch.distributions import (
    Binomial,
    Categorical,
    Distribution,
    Independent,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
    StudentT,
)

from sbi_jeffreys.benchmark.tasks.base import Task


def _box(dim: int, bound: float) -> BoxUniform:
    return BoxUniform(-bound * torch.ones(dim), bound * torch.ones(dim))


def _matrix(seed: int, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


class TuningTask(Task):
    """A task given by its observation model p(x|θ), a torch distribution."""

    def observation_model(self, theta: Tensor) -> Distribution:
        """p(x|θ) with batch shape `(*B,)` and event shape `(dim_x,)` for θ `(*B, D)`."""
        raise NotImplementedError

    def simulate(self, theta: Tensor) -> Tensor:
        return self.observation_model(theta).sample()

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        return self.observation_model(theta).log_prob(x)

    def sample_reference(self, x: Tensor, num_samples: int) -> Tensor:
        raise NotImplementedError(
            f"{self.name} is for tuning on held-out NLL; it has no reference."
        )


class TuneFold(TuningTask):
    """θ ↦ (θ₁², θ₁θ₂) with small noise: two narrow curved modes, θ and −θ."""

    name, dim_theta, dim_x = "tune_fold", 2, 2
    noise = 0.15

    def __init__(self) -> None:
        self.prior = _box(2, 2.0)

    def observation_model(self, theta: Tensor) -> Distribution:
        mean = torch.stack([theta[..., 0] ** 2, theta[..., 0] * theta[..., 1]], -1)
        return Independent(Normal(mean, self.noise), 1)


class TuneNarrow(TuneFold):
    """The fold with a fifth of its noise: two thin arcs, with little probability between them."""

    name, noise = "tune_narrow", 0.03


class TuneArc(TuningTask):
    """θ ↦ (|θ|², 0.3 θ₁²): four short arcs, thin across and long along."""

    name, dim_theta, dim_x = "tune_arc", 2, 2

    def __init__(self) -> None:
        self.prior = _box(2, 1.0)

    def observation_model(self, theta: Tensor) -> Distribution:
        mean = torch.stack([theta.square().sum(-1), 0.3 * theta[..., 0] ** 2], -1)
        return Independent(Normal(mean, torch.tensor([0.03, 0.1]).expand_as(mean)), 1)


class TuneLinear(TuningTask):
    """Eight-dimensional linear Gaussian with a mixing matrix and correlated prior."""

    name, dim_theta, dim_x = "tune_linear", 8, 8

    def __init__(self) -> None:
        a = _matrix(1, 8, 8) / 8**0.5
        self.mixing = torch.eye(8) + 0.5 * a
        self.prior = MultivariateNormal(torch.zeros(8), 0.3 * torch.eye(8) + 0.2 * a @ a.T)

    def observation_model(self, theta: Tensor) -> Distribution:
        return Independent(Normal(theta @ self.mixing.T, 0.4), 1)


class TuneIID(TuningTask):
    """Five i.i.d. draws from N((θ₁, θ₁θ₂/2), diag(θ₃², θ₄²) + 0.05): sign symmetries."""

    name, dim_theta, dim_x = "tune_iid", 4, 10

    def __init__(self) -> None:
        self.prior = _box(4, 2.0)

    def observation_model(self, theta: Tensor) -> Distribution:
        mean = torch.stack([theta[..., 0], theta[..., 0] * theta[..., 1] / 2], -1)
        scale = (theta[..., 2:] ** 2 + 0.05).sqrt()
        repeat = (1,) * (theta.ndim - 1) + (5,)
        return Independent(Normal(mean.repeat(repeat), scale.repeat(repeat)), 1)


class TunePoisson(TuningTask):
    """Poisson regression, six coefficients, ten counts."""

    name, dim_theta, dim_x = "tune_poisson", 6, 10

    def __init__(self) -> None:
        self.design = _matrix(2, 10, 6) / 2
        self.prior = MultivariateNormal(torch.zeros(6), torch.eye(6))

    def observation_model(self, theta: Tensor) -> Distribution:
        rate = (1.5 + theta @ self.design.T).clamp(max=8.0).exp()
        return Independent(Poisson(rate), 1)


class TuneDecay(TuningTask):
    """Two-compartment decay observed by binomial counts; log-normal rates, many zeros."""

    name, dim_theta, dim_x = "tune_decay", 2, 10

    def __init__(self) -> None:
        self.prior = Independent(LogNormal(torch.tensor([-1.0, -2.0]), torch.tensor([0.6, 0.4])), 1)
        self.times = torch.linspace(1.0, 40.0, 10)

    def observation_model(self, theta: Tensor) -> Distribution:
        a, b = theta[..., :1], theta[..., 1:]
        p = a / (a - b + 1e-4) * (torch.exp(-b * self.times) - torch.exp(-a * self.times))
        return Independent(Binomial(1000, probs=p.clamp(1e-6, 1 - 1e-6)), 1)


class TuneGrowth(TuningTask):
    """Damped oscillation of a positive quantity under log-normal noise; sharp posteriors."""

    name, dim_theta, dim_x = "tune_growth", 4, 16

    def __init__(self) -> None:
        loc, scale = torch.tensor([-0.2, -2.0, 0.0, 0.5]), torch.tensor([0.4, 0.5, 0.5, 0.5])
        self.prior = Independent(LogNormal(loc, scale), 1)
        self.times = torch.linspace(0.5, 12.0, 8)

    def observation_model(self, theta: Tensor) -> Distribution:
        frequency, damping, offset, amplitude = theta.unsqueeze(-1).unbind(-2)
        wave = torch.exp(-damping * self.times)
        first = offset + amplitude * wave * torch.cos(frequency * self.times)
        second = offset - amplitude * wave * torch.sin(frequency * self.times)
        return Independent(LogNormal(torch.cat([first, second], -1), 0.15), 1)


class TuneOutliers(TuningTask):
    """A smooth mean under Student's t with two degrees of freedom: no variance."""

    name, dim_theta, dim_x = "tune_outliers", 3, 4

    def __init__(self) -> None:
        self.mixing = _matrix(3, 3, 4) / 3**0.5
        self.prior = _box(3, 2.0)

    def observation_model(self, theta: Tensor) -> Distribution:
        mean = torch.sin(theta) @ self.mixing + 0.5 * theta @ self.mixing.flip(0)
        return Independent(StudentT(2.0, mean, 0.1), 1)


class TuneGlitch(TuningTask):
    """A quadratic mean; three observations in ten are seven times as noisy, all of x at once."""

    name, dim_theta, dim_x = "tune_glitch", 3, 3

    def __init__(self) -> None:
        self.prior = _box(3, 2.0)

    def observation_model(self, theta: Tensor) -> Distribution:
        a, b, c = theta.unbind(-1)
        mean = torch.stack([a + 0.3 * b**2, b - c, 1.5 * c], -1).unsqueeze(-2)
        scale = torch.tensor([1.0, 0.15]).unsqueeze(-1)
        levels = Independent(Normal(mean, scale), 1)
        return MixtureSameFamily(
            Categorical(torch.tensor([0.3, 0.7]).expand(levels.batch_shape)), levels
        )


TUNING_TASKS: dict[str, type[TuningTask]] = {
    cls.name: cls
    for cls in (
        TuneFold,
        TuneLinear,
        TuneIID,
        TunePoisson,
        TuneDecay,
        TuneGrowth,
        TuneOutliers,
        TuneGlitch,
    )
}

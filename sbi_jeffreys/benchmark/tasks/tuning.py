"""Tasks that settings are tuned on, so that the ten benchmark tasks stay unseen.

Each one resembles a family of benchmark tasks (two narrow modes, a linear Gaussian, few i.i.d.
draws with sign symmetries, a generalised linear model, counts from a dynamical system, positive
heavy-tailed output, noise that is not Gaussian) without being any of them. Their likelihoods are
exact; they have no reference, because tuning uses the held-out NLL, coverage and leakage.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
from sbi_jeffreys.benchmark.tasks.curves import TuneTrace


class TuningTask(Task):
    """A task given by its prior and its observation model p(x|θ), a torch distribution.

    Args:
        name: Identifier.
        prior: Prior over θ, event shape `(D,)`.
        observation_model: Maps θ `(*B, D)` to p(x|θ), batch shape `(*B,)`, event shape `(dim_x,)`.
    """

    def __init__(
        self, name: str, prior: Distribution, observation_model: Callable[[Tensor], Distribution]
    ) -> None:
        self.name, self.prior, self.observation_model = name, prior, observation_model
        (self.dim_theta,) = prior.event_shape
        (self.dim_x,) = observation_model(prior.mean).event_shape

    def simulate(self, theta: Tensor) -> Tensor:
        return self.observation_model(theta).sample()

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        return self.observation_model(theta).log_prob(x)

    def sample_reference(self, x: Tensor, num_samples: int) -> Tensor:
        raise NotImplementedError(
            f"{self.name} is for tuning on held-out NLL; it has no reference."
        )


def _box(dim: int, bound: float) -> BoxUniform:
    return BoxUniform(-bound * torch.ones(dim), bound * torch.ones(dim))


def _matrix(seed: int, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _log_normal(loc: list[float], scale: list[float]) -> Distribution:
    return Independent(LogNormal(torch.tensor(loc), torch.tensor(scale)), 1)


def _fold(theta: Tensor, noise: float) -> Distribution:
    """θ ↦ (θ₁², θ₁θ₂) with small noise: two narrow curved modes, θ and −θ."""
    mean = torch.stack([theta[..., 0] ** 2, theta[..., 0] * theta[..., 1]], -1)
    return Independent(Normal(mean, noise), 1)


def _arc(theta: Tensor) -> Distribution:
    """θ ↦ (|θ|², 0.3 θ₁²): four short arcs, thin across and long along."""
    mean = torch.stack([theta.square().sum(-1), 0.3 * theta[..., 0] ** 2], -1)
    return Independent(Normal(mean, torch.tensor([0.03, 0.1]).expand_as(mean)), 1)


_LINEAR = _matrix(1, 8, 8) / 8**0.5


def _linear(theta: Tensor) -> Distribution:
    """Eight-dimensional linear Gaussian with a mixing matrix; its prior is correlated."""
    return Independent(Normal(theta @ (torch.eye(8) + 0.5 * _LINEAR).T, 0.4), 1)


def _iid(theta: Tensor) -> Distribution:
    """Five i.i.d. draws from N((θ₁, θ₁θ₂/2), diag(θ₃², θ₄²) + 0.05): sign symmetries."""
    mean = torch.stack([theta[..., 0], theta[..., 0] * theta[..., 1] / 2], -1)
    scale = (theta[..., 2:] ** 2 + 0.05).sqrt()
    repeat = (1,) * (theta.ndim - 1) + (5,)
    return Independent(Normal(mean.repeat(repeat), scale.repeat(repeat)), 1)


def _poisson(theta: Tensor) -> Distribution:
    """Poisson regression, six coefficients, ten counts."""
    rate = (1.5 + theta @ (_matrix(2, 10, 6) / 2).T).clamp(max=8.0).exp()
    return Independent(Poisson(rate), 1)


def _decay(theta: Tensor) -> Distribution:
    """Two-compartment decay observed by binomial counts; log-normal rates, many zeros."""
    a, b, times = theta[..., :1], theta[..., 1:], torch.linspace(1.0, 40.0, 10)
    p = a / (a - b + 1e-4) * (torch.exp(-b * times) - torch.exp(-a * times))
    return Independent(Binomial(1000, probs=p.clamp(1e-6, 1 - 1e-6)), 1)


def _growth(theta: Tensor) -> Distribution:
    """Damped oscillation of a positive quantity under log-normal noise; sharp posteriors."""
    frequency, damping, offset, amplitude = theta.unsqueeze(-1).unbind(-2)
    times = torch.linspace(0.5, 12.0, 8)
    wave = torch.exp(-damping * times)
    first = offset + amplitude * wave * torch.cos(frequency * times)
    second = offset - amplitude * wave * torch.sin(frequency * times)
    return Independent(LogNormal(torch.cat([first, second], -1), 0.15), 1)


def _outliers(theta: Tensor) -> Distribution:
    """A smooth mean under Student's t with two degrees of freedom: no variance."""
    mixing = _matrix(3, 3, 4) / 3**0.5
    mean = torch.sin(theta) @ mixing + 0.5 * theta @ mixing.flip(0)
    return Independent(StudentT(2.0, mean, 0.1), 1)


def _glitch(theta: Tensor) -> Distribution:
    """A quadratic mean; three observations in ten are seven times as noisy, all of x at once."""
    a, b, c = theta.unbind(-1)
    mean = torch.stack([a + 0.3 * b**2, b - c, 1.5 * c], -1).unsqueeze(-2)
    levels = Independent(Normal(mean, torch.tensor([1.0, 0.15]).unsqueeze(-1)), 1)
    shares = Categorical(torch.tensor([0.3, 0.7]).expand(levels.batch_shape))
    return MixtureSameFamily(shares, levels)


_LINEAR_PRIOR = MultivariateNormal(torch.zeros(8), 0.3 * torch.eye(8) + 0.2 * _LINEAR @ _LINEAR.T)
_GROWTH_PRIOR = _log_normal([-0.2, -2.0, 0.0, 0.5], [0.4, 0.5, 0.5, 0.5])
#: The tuning tasks by name. `tune_narrow`, the fold with a fifth of its noise, has two thin arcs.
TUNING_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        TuningTask("tune_fold", _box(2, 2.0), partial(_fold, noise=0.15)),
        TuningTask("tune_narrow", _box(2, 2.0), partial(_fold, noise=0.03)),
        TuningTask("tune_arc", _box(2, 1.0), _arc),
        TuningTask("tune_linear", _LINEAR_PRIOR, _linear),
        TuningTask("tune_iid", _box(4, 2.0), _iid),
        TuningTask("tune_poisson", MultivariateNormal(torch.zeros(6), torch.eye(6)), _poisson),
        TuningTask("tune_decay", _log_normal([-1.0, -2.0], [0.6, 0.4]), _decay),
        TuningTask("tune_growth", _GROWTH_PRIOR, _growth),
        TuningTask("tune_outliers", _box(3, 2.0), _outliers),
        TuningTask("tune_glitch", _box(3, 2.0), _glitch),
        TuneTrace(),
    )
}

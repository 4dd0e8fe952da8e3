"""Curves and spectra as plain vectors of x: 100 outputs and more, with a known likelihood.

Each is a smooth signal of a few parameters in white noise, as in light curves, spectra, free
induction decays and intracellular traces. The networks see the raw outputs, without an embedding.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from sbi.utils import BoxUniform
from torch import Tensor

from ._reference import adaptive_importance_sample, largest_temperature
from ._student import StudentMixture
from .base import Task

__all__ = ["CURVE_TASKS", "AbsorptionLine", "Curve", "DampedWave", "TuneTrace"]

_NUM_SCOUTS = 100_000
_SCOUT_SAMPLE_SIZE = 50.0


class Curve(Task):
    """x_j = f(t_j; θ) + e^s ε_j, ε_j ∼ N(0, 1), with a uniform prior; s may be a parameter.

    Attributes:
        bounds: Lower and upper end of each parameter.
    """

    bounds: tuple[tuple[float, float], ...]

    def __init__(self) -> None:
        low, high = torch.tensor(self.bounds).T
        self.dim_theta = len(self.bounds)
        self.prior = BoxUniform(low, high)

    def times(self, like: Tensor) -> Tensor:
        """The sampling times, evenly over [0, 1], `(dim_x,)`."""
        return torch.linspace(0.0, 1.0, self.dim_x, dtype=like.dtype, device=like.device)

    @abstractmethod
    def signal(self, theta: Tensor) -> Tensor:
        """f without noise: `(*B, D)` → `(*B, dim_x)`."""

    @abstractmethod
    def log_noise(self, theta: Tensor) -> Tensor:
        """s, the logarithm of the noise's standard deviation: `(*B, D)` → `(*B,)`."""

    def simulate(self, theta: Tensor) -> Tensor:
        signal = self.signal(theta)
        return signal + self.log_noise(theta).exp()[..., None] * torch.randn_like(signal)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        params = theta.double()
        log_noise = self.log_noise(params)
        squares = (x.double() - self.signal(params)).square().sum(-1)
        log_det = self.dim_x * (log_noise + 0.5 * math.log(2.0 * math.pi))
        return (-0.5 * squares * (-2.0 * log_noise).exp() - log_det).to(theta.dtype)

    def sample_reference(self, x: Tensor, num_samples: int) -> Tensor:
        """Samples of p(θ|x) for one x: adaptive importance sampling that starts from the prior."""
        observed = self.check_observation(x)

        def log_target(theta: Tensor) -> Tensor:
            return self.log_posterior_unnormalised(theta.float(), observed).double()

        scouts = self.prior.sample(torch.Size((_NUM_SCOUTS,)))
        log_weights = torch.cat([self.log_likelihood(s, observed) for s in scouts.split(5_000)])
        log_weights = log_weights.double()
        log_weights = log_weights * largest_temperature(
            lambda temperature: temperature * log_weights, _SCOUT_SAMPLE_SIZE
        )
        start = StudentMixture.fit(scouts.double(), log_weights, num_components=3, df=5.0)
        return adaptive_importance_sample(log_target, start, num_samples, self.name).float()


class AbsorptionLine(Curve):
    """A spectrum with one absorption line on a sloping continuum.

    f(t) = 1 + b (t − ½) − d exp(−(t − c)² / 2w²). θ = (c, log w, d, b, s): centre, width, depth,
    slope, and log noise.
    """

    name, dim_x = "absorption_line", 100
    bounds = ((0.2, 0.8), (-3.7, -2.0), (0.2, 0.9), (-0.5, 0.5), (-3.5, -2.0))

    def signal(self, theta: Tensor) -> Tensor:
        centre, log_width, depth, slope = theta[..., None, :4].unbind(-1)
        t = self.times(theta)
        line = torch.exp(-0.5 * ((t - centre) / log_width.exp()).square())
        return 1.0 + slope * (t - 0.5) - depth * line

    def log_noise(self, theta: Tensor) -> Tensor:
        return theta[..., 4]


class AbsorptionLine300(AbsorptionLine):
    """The spectrum at 300 points."""

    name, dim_x = "absorption_line_300", 300


class AbsorptionLine1000(AbsorptionLine):
    """The spectrum at 1,000 points."""

    name, dim_x = "absorption_line_1000", 1000


class DampedWave(Curve):
    """A damped oscillation of unknown frequency and phase, as a free induction decay.

    f(t) = e^a e^{−gt} cos(2π ν t + φ). θ = (a, ν, φ, g); the noise is 0.2.
    """

    name, dim_x = "damped_wave", 100
    bounds = ((-0.7, 0.7), (1.0, 4.0), (-1.5, 1.5), (0.5, 4.0))

    def signal(self, theta: Tensor) -> Tensor:
        log_scale, frequency, phase, decay = theta[..., None, :].unbind(-1)
        t = self.times(theta)
        wave = torch.cos(2.0 * math.pi * frequency * t + phase)
        return (log_scale - decay * t).exp() * wave

    def log_noise(self, theta: Tensor) -> Tensor:
        return torch.full_like(theta[..., 0], math.log(0.2))


class TuneTrace(Curve):
    """For tuning: a rise and a decay with an onset, as a synaptic current; noise 0.1."""

    name, dim_x = "tune_trace", 100
    bounds = ((0.1, 0.5), (-3.5, -1.5), (-2.0, 0.0), (0.3, 1.5))

    def signal(self, theta: Tensor) -> Tensor:
        onset, log_rise, log_decay, scale = theta[..., None, :].unbind(-1)
        since = (self.times(theta) - onset).clamp_min(0.0)
        return scale * (1.0 - (-since / log_rise.exp()).exp()) * (-since / log_decay.exp()).exp()

    def log_noise(self, theta: Tensor) -> Tensor:
        return torch.full_like(theta[..., 0], math.log(0.1))


#: The curves that are reported, by name; `TuneTrace` is among the tuning tasks.
CURVE_TASKS: dict[str, type[Curve]] = {
    task.name: task for task in (AbsorptionLine, AbsorptionLine300, AbsorptionLine1000, DampedWave)
}

"""Posteriors known in closed form, for the tests of diagnostics and of corrected posteriors."""

import math

import torch
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from sbi_jeffreys._sbi import ConditionalDensityEstimator

NOISE = 0.5
SPREAD = math.sqrt(0.2)  # θ ∼ N(0, I), x ∼ N(θ, ¼ I): posterior N(x / 1.25, 0.2 I)
PRIOR = MultivariateNormal(torch.zeros(2), torch.eye(2))


class Known(ConditionalDensityEstimator):
    """A density estimator with a distribution known in closed form: `law(x)`, batch shape (B,)."""

    def __init__(self, law, dim=2):
        super().__init__(torch.nn.Identity(), torch.Size((dim,)), torch.Size((dim,)))
        self.law = law

    def log_prob(self, input, condition, **kwargs):
        return self.law(condition).log_prob(input)

    def sample(self, sample_shape, condition, **kwargs):
        return self.law(condition).sample(sample_shape)

    def loss(self, input, condition, **kwargs):
        return -self.law(condition).log_prob(input)


def gaussian(scale=1.0, shift=0.0):
    """The posterior, its standard deviation times `scale`, shifted by so many of them."""
    shift = torch.as_tensor(shift) * SPREAD
    return lambda x: Independent(Normal(x / 1.25 + shift, scale * SPREAD), 1)


def two_modes(weight):
    """Modes at ±x/1.25, the first with the given weight; ½ is exact where x's sign is hidden."""

    def law(x):
        means = torch.stack([x, -x], dim=-2) / 1.25
        weights = torch.tensor([weight, 1 - weight]).expand(*x.shape[:-1], 2)
        return MixtureSameFamily(Categorical(weights), Independent(Normal(means, SPREAD), 1))

    return law


def log_likelihood(theta, x):
    return Normal(theta, NOISE).log_prob(x).sum(-1)


def pairs(num, prior=PRIOR, hidden_sign=False):
    theta = prior.sample((num,))
    sign = torch.randn(num, 1).sign() if hidden_sign else 1.0
    return theta, sign * theta + NOISE * torch.randn(num, 2)

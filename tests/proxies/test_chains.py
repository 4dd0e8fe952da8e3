"""Chains take pairs of the rounds' proposals to the posterior under the prior."""

import pytest
import torch
from sbi.utils import BoxUniform
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.proxies.chains import MixtureOfRounds, moved_to_prior

NOISE = 0.3


class Exact(Proxy):
    """x = θ + noise in two dimensions, θ ∼ N(0, 1)."""

    def __init__(self) -> None:
        super().__init__(MultivariateNormal(torch.zeros(2), torch.eye(2)))

    def log_factor(self, theta: Tensor, x: Tensor) -> Tensor:
        return Normal(theta, NOISE).log_prob(x).sum(dim=-1)


class OfTheSize(Proxy):
    """x = |θ| + noise, θ uniform on [−2, 2]: both signs are equally probable at every x."""

    def __init__(self) -> None:
        super().__init__(BoxUniform(-2 * torch.ones(1), 2 * torch.ones(1)))

    def log_factor(self, theta: Tensor, x: Tensor) -> Tensor:
        return Normal(theta.abs(), 0.1).log_prob(x).sum(dim=-1)


def narrow_rounds(num: int) -> tuple[Tensor, Tensor, Tensor]:
    """θ of a prior round, θ of a proposal N(0.8, 0.3²), and x of the latter."""
    proposed = 0.8 + 0.3 * torch.randn(num, 2)
    return torch.randn(300, 2), proposed, proposed + NOISE * torch.randn(num, 2)


@pytest.mark.parametrize("num", [1, 3])
def test_moved_draws_follow_the_posterior_under_the_prior(num):
    """Under the proposal it is N((x + 0.8) / 2, 0.045), under the prior N(x / 1.09, 0.083)."""
    torch.manual_seed(0)
    proxy = Exact()
    first, second, x = narrow_rounds(4_000)
    mixture = MixtureOfRounds(proxy, [first, second[:300]])
    moved = moved_to_prior(proxy, second, x, mixture, second[:300], num)
    assert moved.shape == (num, 4_000, 2)
    white = (moved - x / (1 + NOISE**2)) / (NOISE / (1 + NOISE**2) ** 0.5)
    # In these units the posterior under the proposal has a standard deviation of 0.74, and a mean
    # that depends on x.
    assert float(white.mean()) == pytest.approx(0.0, abs=0.05)
    assert float(white.std()) == pytest.approx(1.0, abs=0.04)
    slope = (white * (x - x.mean(dim=0))).mean() / x.var()
    assert float(slope) == pytest.approx(0.0, abs=0.15)


def test_modes_get_the_proportions_of_the_prior():
    """Nine tenths of the proposed θ are positive, and half of the posterior's mass is."""
    torch.manual_seed(0)
    proxy = OfTheSize()
    sign = torch.where(torch.rand(2_000, 1) < 0.9, 1.0, -1.0)
    theta = sign * (1 + 0.05 * torch.randn(2_000, 1))
    x = theta.abs() + 0.1 * torch.randn(2_000, 1)
    rounds = [proxy.sample_prior(300), theta[:300]]
    moved = moved_to_prior(proxy, theta, x, MixtureOfRounds(proxy, rounds), theta[:300])[0]
    assert float((moved > 0).float().mean()) == pytest.approx(0.5, abs=0.06)
    assert bool((moved.abs() <= 2).all())


def test_draws_follow_a_tempered_proxy():
    torch.manual_seed(0)
    proxy = Exact()
    proxy.inverse_temperature.fill_(0.25)
    first, second, x = narrow_rounds(4_000)
    mixture = MixtureOfRounds(proxy, [first, second[:300]])
    moved = moved_to_prior(proxy, second, x, mixture, second[:300])[0]
    variance = 1 / (1 + 0.25 / NOISE**2)
    white = (moved - variance * 0.25 / NOISE**2 * x) / variance**0.5
    assert float(white.std()) == pytest.approx(1.0, abs=0.06)


def test_the_mixture_has_equal_parts_and_its_density():
    torch.manual_seed(0)
    proxy = Exact()
    mixture = MixtureOfRounds(proxy, [3.0 + 0.1 * torch.randn(50, 2)])
    drawn = mixture.sample(4_000)
    near = (drawn - 3.0).norm(dim=1) < 1.0
    assert float(near.float().mean()) == pytest.approx(0.5, abs=0.03)
    # ∫ m = 2 over the mixture, whose two parts are not divided by their number.
    inside = torch.exp(-mixture.log_prob(drawn[near]))
    assert float(inside.mean()) * 0.5 * 2 == pytest.approx(torch.pi, rel=0.2)

"""θ̃ resampled at given observations follow the proxy, and say where they do not."""

import functools

import pytest
import torch
from sbi.utils import BoxUniform
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.proxies.chains import MixtureOfRounds
from sbi_jeffreys.proxies.given import GivenProxy
from sbi_jeffreys.proxies.normaliser import adapted_draws
from sbi_jeffreys.training.pool import draw_pool, pool_of_later_rounds, resampled_pool

NOISE = 0.3


class Exact(Proxy):
    """x = θ + noise; at x > 10 the likelihood is a spike in θ that no proposal finds."""

    def __init__(self) -> None:
        super().__init__(MultivariateNormal(torch.zeros(1), torch.eye(1)))

    def log_factor(self, theta: Tensor, x: Tensor) -> Tensor:
        normal = Normal(theta, NOISE).log_prob(x)[..., 0]
        spike = -1e6 * (theta[..., 0] - 0.1234567) ** 2
        return torch.where(x[:, 0] > 10, spike, normal)


class Main(torch.nn.Module):
    """N(0.5, 1.5²) whatever x is."""

    embedding_net = None

    def log_prob(self, theta: Tensor, x: Tensor) -> Tensor:
        return Normal(0.5, 1.5).log_prob(theta)[..., 0]

    def sample(self, shape: torch.Size, x: Tensor) -> Tensor:
        return 0.5 + 1.5 * torch.randn(*shape, len(x), 1)


def test_resampled_theta_follow_the_proxys_posterior():
    """N(x / 1.09, 0.09 / 1.09) at each of 200 x, 64 θ̃ each."""
    torch.manual_seed(0)
    theta = torch.randn(200, 1)
    x = theta + NOISE * torch.randn(200, 1)
    pool = resampled_pool(Exact(), Main(), theta, x)  # type: ignore[arg-type]
    assert pool.grouped
    assert pool.theta.shape == (64, 200, 1)
    centred = pool.theta - x / (1 + NOISE**2)
    assert float(centred.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(centred.std()) == pytest.approx(NOISE / (1 + NOISE**2) ** 0.5, rel=0.05)
    assert float(pool.weights.min()) == 1.0
    rows = pool.draw(7)
    assert pool.theta_at(rows, 3).shape == (3, 7, 1)


def test_an_observation_whose_weights_collapse_is_drawn_less_often(monkeypatch):
    torch.manual_seed(0)
    once = functools.partial(adapted_draws, max_rounds=0)
    monkeypatch.setattr("sbi_jeffreys.training.pool.adapted_draws", once)
    theta, x = torch.zeros(4, 1), torch.tensor([[0.0], [0.5], [11.0], [12.0]])
    pool = resampled_pool(Exact(), Main(), theta, x)  # type: ignore[arg-type]
    assert float(pool.weights[:2].min()) == 1.0
    assert float(pool.weights[2:].max()) < 1.0


def test_an_observation_without_any_mass_is_never_drawn():
    class Nowhere(Exact):
        def log_factor(self, theta: Tensor, x: Tensor) -> Tensor:
            return torch.where(x[:, 0] > 10, -torch.inf, super().log_factor(theta, x))

    torch.manual_seed(0)
    x = torch.tensor([[0.0], [11.0]])
    pool = resampled_pool(Nowhere(), Main(), torch.zeros(2, 1), x)  # type: ignore[arg-type]
    assert pool.weights.tolist() == [1.0, 0.0]


class AbsurdAtSome(Exact):
    """The exact likelihood, except for x between 0 and 0.25, where it is 3 off."""

    def log_factor(self, theta: Tensor, x: Tensor) -> Tensor:
        wrong = (x[:, 0] > 0) & (x[:, 0] < 0.25)
        return super().log_factor(theta, torch.where(wrong.unsqueeze(1), x + 3, x))


def test_observations_at_which_the_proxy_is_absurd_are_hardly_ever_drawn():
    """Exact elsewhere: fewer than one in twenty of those lose weight (Markov's inequality)."""
    torch.manual_seed(0)
    theta = torch.randn(2_000, 1)
    x = theta + NOISE * torch.randn(2_000, 1)
    pool = resampled_pool(AbsurdAtSome(), Main(), theta, x)  # type: ignore[arg-type]
    wrong = (x[:, 0] > 0) & (x[:, 0] < 0.25)
    assert 0.05 < float(wrong.float().mean()) < 0.15
    assert float(pool.weights[wrong].max()) < 1e-3
    assert float((pool.weights[~wrong] < 1).float().mean()) < 0.05


def test_parameters_of_later_rounds_are_distinct_and_inside():
    prior = BoxUniform(torch.zeros(2), torch.ones(2))
    proxy = GivenProxy(prior, lambda theta, x: torch.zeros(len(theta)), lambda theta: theta)
    rows = 0.1 * torch.rand(100, 2)
    theta, _ = draw_pool(proxy, rows, first_round=False, num_draws=2_000)
    assert bool(prior.support.check(theta).all())  # type: ignore[union-attr]
    assert len(theta.unique(dim=0)) > 1_400  # most draws of the kernel density are inside
    assert float(theta.max()) < 0.3


class Samples(Exact):
    """The exact likelihood, with draws of x."""

    can_sample = True


class InUnitInterval(Samples):
    """As above, θ uniform on [0, 1], and of no density at any other θ that a chain might reach."""

    def __init__(self) -> None:
        Proxy.__init__(self, BoxUniform(torch.zeros(1), torch.ones(1)))

    def log_factor(self, theta: Tensor, x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 10, -torch.inf, super().log_factor(theta, x))


@pytest.mark.parametrize("proxy", [Exact(), Samples()])
def test_pairs_of_later_rounds_follow_the_posterior_under_the_prior(proxy):
    """One θ̃ for each draw of a proxy, 64 for each simulation where the proxy cannot draw x."""
    torch.manual_seed(0)
    theta = 1.0 + 0.3 * torch.randn(1_000, 1)
    x = theta + NOISE * torch.randn(1_000, 1)
    mixture = MixtureOfRounds(proxy, [torch.randn(200, 1), theta[:200]])
    pool = pool_of_later_rounds(proxy, theta, x, mixture, theta[:200])
    assert pool.grouped == (not proxy.can_sample)
    assert pool.theta.shape == ((1_000, 1) if proxy.can_sample else (64, 1_000, 1))
    white = (pool.theta - x / (1 + NOISE**2)) * (1 + NOISE**2) ** 0.5 / NOISE
    assert float(white.mean()) == pytest.approx(0.0, abs=0.1)
    assert float(white.std()) == pytest.approx(1.0, abs=0.08)
    assert float(pool.weights.min()) == 1.0


def test_pairs_of_later_rounds_outside_the_prior_are_never_drawn():
    torch.manual_seed(0)
    proxy = InUnitInterval()
    theta = torch.tensor([[0.5], [1.5], [0.4]])
    x = torch.tensor([[0.5], [11.0], [0.4]])
    mixture = MixtureOfRounds(proxy, [torch.rand(20, 1)])
    pool = pool_of_later_rounds(proxy, theta, x, mixture, torch.rand(20, 1))
    assert pool.weights.tolist() == [1.0, 0.0, 1.0]

"""The defensive mixture: every user of it, under priors that take no two-dimensional shapes."""

import math

import pytest
import torch
from sbi.neural_nets.embedding_nets import FCEmbedding
from sbi.utils import MultipleIndependent
from torch import Tensor
from torch.distributions import LogNormal, MultivariateNormal, Uniform

from sbi_jeffreys import EnergyConfig, JeffreysOptions, MainBuilder, NPE_Jeffreys
from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.proxies import GivenProxy
from sbi_jeffreys.proxies.partition import (
    defensive_draws,
    defensive_log_normaliser,
    draw_contrasts,
)

MIXED = MultipleIndependent(
    [Uniform(torch.zeros(1), torch.ones(1)), LogNormal(torch.zeros(1), torch.ones(1))]
)


class Main(torch.nn.Module):
    """N(shift, 0.5²) whatever x is; NaN densities where asked for."""

    embedding_net = None

    def __init__(self, failing: bool = False) -> None:
        super().__init__()
        self.failing = failing
        self.density = MultivariateNormal(torch.full((2,), 0.5), 0.25 * torch.eye(2))

    def sample(self, shape: torch.Size, x: Tensor) -> Tensor:
        return self.density.sample((*shape, len(x)))

    def log_prob(self, theta: Tensor, x: Tensor) -> Tensor:
        log_prob = self.density.log_prob(theta)
        return log_prob * math.nan if self.failing else log_prob


def flat(theta: Tensor, x: Tensor) -> Tensor:
    return torch.zeros(len(theta))


def test_draws_are_main_then_prior_with_the_density_of_the_mixture():
    proxy, main, x = GivenProxy(MIXED, flat), Main(), torch.zeros(3, 2)
    first = MIXED.sample((3,))
    theta, log_m, log_prior = defensive_draws(proxy, main, x, 4_000, first)  # type: ignore[arg-type]
    assert theta.shape == (4_001, 3, 2)
    assert torch.equal(theta[0], first)
    assert bool(torch.isfinite(log_prior[3_001:]).all())  # the prior's quarter
    expected = (0.75 * main.density.log_prob(theta).exp() + 0.25 * log_prior.exp()).log()
    torch.testing.assert_close(log_m, expected)
    # The prior integrates to one, and no weight exceeds 4: an effective sample size of a quarter.
    log_z, size = defensive_log_normaliser(proxy, main, x, 4_000)  # type: ignore[arg-type]
    torch.testing.assert_close(log_z, torch.zeros(3), atol=0.1, rtol=0)
    assert bool((size >= 1_000 * 0.9).all())


def test_where_the_main_fails_the_prior_is_left():
    proxy, x = GivenProxy(MIXED, flat), torch.zeros(3, 2)
    _, log_m, log_prior = defensive_draws(proxy, Main(failing=True), x, 40)  # type: ignore[arg-type]
    torch.testing.assert_close(log_m, log_prior + math.log(0.25))


def test_contrasts_in_any_order_are_the_mixture():
    proxy, x = GivenProxy(MIXED, flat), torch.zeros(3, 2)
    contrasts = draw_contrasts(proxy, Main(), MIXED.sample((3,)), x, 4_000)  # type: ignore[arg-type]
    inside = torch.isfinite(contrasts.offset)
    assert contrasts.theta.shape == (4_000, 3, 2)
    # Of both halves as many come from the prior, which is never outside its own support.
    halves = inside.double().reshape(2, 2_000, 3).mean(1)
    torch.testing.assert_close(halves[0], halves[1], atol=0.06, rtol=0)


@pytest.mark.parametrize("rounds", [1, 2])
def test_an_embedding_net_trains_under_a_prior_of_independent_parts(rounds: int):
    options = JeffreysOptions(
        energy=EnergyConfig(hidden_features=10, num_contrasts=4, fit=FitConfig(max_epochs=2)),
        num_steps=4,
        steps_per_epoch=2,
        min_trust=0.0,
    )
    main = MainBuilder("maf", embedding_net=FCEmbedding(2, 3))
    inference = NPE_Jeffreys(MIXED, main, show_progress_bars=False, options=options)
    for _ in range(rounds):
        theta = MIXED.sample((60,))
        inference.append_simulations(theta, theta + 0.1 * torch.randn(60, 2))
        inference.train(max_num_epochs=2, force_first_round_loss=True)
    assert torch.isfinite(inference.proxy.log_potential(theta.unsqueeze(0), theta)).all()

"""The distribution of θ over rounds of truncated proposals, against its closed form."""

import math

import torch
from sbi.utils import BoxUniform, RestrictedPrior
from torch.distributions import MultivariateNormal

from sbi_jeffreys import GivenProxy, JeffreysOptions, NPE_Jeffreys
from sbi_jeffreys.proxies.truncated import TruncatedRounds
from sbi_jeffreys.training.report import ProxyStatus

BOX = BoxUniform(-torch.ones(2), torch.ones(2))
SIDE = 0.1  # the region is |θ| < 0.1, in either direction


def inside(theta: torch.Tensor) -> torch.Tensor:
    return (theta.abs() < SIDE).all(dim=-1)


def rounds(prior=BOX, first: int = 100, later: int = 300) -> TruncatedRounds:
    torch.manual_seed(0)
    truncated = RestrictedPrior(prior, inside)
    theta = SIDE * (2 * torch.rand(later, 2) - 1)
    return TruncatedRounds(prior, [(None, prior.sample((first,))), (truncated, theta)])


def test_density_is_the_mixture_of_the_rounds():
    """Z is .01; 8,192 draws of a kernel density, of which more than half are effective: 1.6 %."""
    theta = torch.tensor([[0.0, 0.05], [0.5, 0.0], [-0.99, 0.3], [1.5, 0.0]])
    found = rounds().log_prob(theta[:3])
    within = 0.25 * 0.25 + 0.75 * 0.25 / 0.01
    assert abs(float(found[0]) - math.log(within)) < 4 * 0.016
    assert torch.allclose(found[1:], torch.tensor(0.25 * 0.25).log())
    proxy = GivenProxy(rounds(), lambda theta, x: torch.zeros(len(theta)))
    assert float(proxy.log_prior(theta)[3]) == -math.inf


def test_a_region_without_any_of_its_parameters_counts_as_the_prior():
    elsewhere = RestrictedPrior(BOX, lambda theta: theta[:, 0] > 2)
    found = TruncatedRounds(BOX, [(elsewhere, SIDE * torch.rand(50, 2))])
    assert torch.allclose(found.log_prob(torch.zeros(1, 2)), torch.tensor(0.25).log())
    assert float(found.sample(torch.Size((500,))).std()) > 0.5


def test_a_region_that_few_candidates_hit_has_draws():
    """Two strips at the box's edges: one candidate in 1,400 is inside."""
    torch.manual_seed(0)
    theta = BOX.sample((40,))
    theta[:, 0] = theta[:, 0].sign() * (1 - 1e-3 * torch.rand(40))
    strips = RestrictedPrior(BOX, lambda theta: theta[:, 0].abs() > 1 - 1e-3)
    found = TruncatedRounds(BOX, [(strips, theta)])
    drawn = torch.cat([found.sample(torch.Size((1,))) for _ in range(20)])
    assert bool((drawn[:, 0].abs() > 1 - 1e-3).all())
    assert 0 < int((drawn[:, 0] > 0).sum()) < 20


def test_draws_follow_it():
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
    drawn = rounds(prior, later=200).sample(torch.Size((30, 300)))
    assert drawn.shape == (30, 300, 2)
    mixture = rounds(prior, first=1)
    assert all(mixture.sample(torch.Size((1,))).shape == (1, 2) for _ in range(30))
    assert mixture.sample().shape == (2,)
    flat = drawn.reshape(-1, 2)
    share = inside(flat).float().mean()
    expected = 2 / 3 + 1 / 3 * math.erf(SIDE / 2**0.5) ** 2
    assert abs(float(share) - expected) < 4 * (0.25 / 9_000) ** 0.5
    near = flat[inside(flat)]  # of a nearly flat prior: uniform
    assert abs(float(near.std()) - SIDE / 3**0.5) < 0.003
    assert abs(float(flat[~inside(flat)].std()) - 1) < 0.05


def test_the_proxy_is_compared_and_draws_where_the_rounds_are():
    """Under the prior, an exact likelihood was judged worse than plain NPE."""

    def log_likelihood(theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return -50 * ((x - theta) ** 2).sum(-1)

    def simulate(theta: torch.Tensor) -> torch.Tensor:
        return theta + 0.1 * torch.randn_like(theta)

    torch.manual_seed(0)
    options = JeffreysOptions(num_steps=20, proxy=GivenProxy(BOX, log_likelihood, simulate))
    inference = NPE_Jeffreys(BOX, "maf", show_progress_bars=False, options=options)
    theta = BOX.sample((200,))
    inference.append_simulations(theta, simulate(theta)).train(max_num_epochs=20)
    later = SIDE * (2 * torch.rand(400, 2) - 1)
    proposal = RestrictedPrior(BOX, inside)
    inference.append_simulations(later, simulate(later), proposal)
    inference.train(force_first_round_loss=True, max_num_epochs=20)
    assert inference.training_report.proxy_status is ProxyStatus.USED
    pool = inference._training.stage.pool
    assert 0.6 < float(inside(pool.theta).float().mean()) < 0.75  # 400 of 600, and 1 % of 200
    assert options.proxy.prior is BOX  # type: ignore[union-attr]  # other trainers may have it

"""Linear summaries against a Gaussian, whose density factorises, and the main's input."""

import math

import torch
from torch.distributions import Chi2

from sbi_jeffreys.networks.standardised import WIDE, StandardisedInput
from sbi_jeffreys.networks.summaries import LinearSummaries
from sbi_jeffreys.networks.transforms import MarginalTransform


def summaries(dim: int = 7, num: int = 2) -> LinearSummaries:
    directions = torch.linalg.qr(torch.randn(dim, num))[0]
    return LinearSummaries(torch.randn(dim), torch.rand(dim) + 0.5, directions)


def test_the_density_is_that_of_the_summaries_times_the_known_factor():
    """Of white noise: N(0, I) of the coordinates, and a χ distribution of the rest's length."""
    torch.manual_seed(0)
    net = summaries().double()
    y = net.centre + net.scale * torch.randn(50, 7).double()
    s = net(y)
    white = (y - net.centre) / net.scale
    exact = -0.5 * (white.square() + math.log(2 * math.pi)).sum(1) - net.scale.log().sum()
    along = -0.5 * (s[:, :2].square() + math.log(2 * math.pi)).sum(1)
    squared = (2 * s[:, 2]).exp()
    # The density of log r is 2 r² times that of r².
    length = Chi2(torch.tensor(5.0).double()).log_prob(squared) + math.log(2) + squared.log()
    assert torch.allclose(along + length + net.log_det(y), exact, atol=1e-9)


def test_join_undoes_split():
    torch.manual_seed(0)
    net = summaries()
    y = torch.randn(20, 7)
    assert torch.allclose(net.join(net(y), net.split(y)[1]), y, atol=1e-5)
    other = torch.randn(20, 7)
    mixed = net.join(net(y), net.split(other)[1])
    assert torch.allclose(net(mixed), net(y), atol=1e-4)


def wide_input(dim: int = 60) -> tuple[StandardisedInput, torch.Tensor]:
    x = torch.randn(200, dim)
    return StandardisedInput(MarginalTransform.fit(x, choose=False), x), x


def test_a_signal_reaches_the_main_as_thirty_trained_combinations():
    net, x = wide_input()
    assert net(x).shape == (200, WIDE)
    assert any(parameter.requires_grad for parameter in net.parameters())
    counts = torch.randint(0, 9, (200, 60)).float()
    net = StandardisedInput(MarginalTransform.fit(counts), counts)
    assert net(counts).shape == (200, 60)
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_after_the_switch_the_main_sees_the_summaries_alone_all_of_about_the_same_size():
    torch.manual_seed(0)
    net, x = wide_input()
    plain, before = net.state_dict(), net(x).detach()
    plain = {name: value.clone() for name, value in plain.items()}
    given = summaries(60, 3)
    net.use_summaries(given, x)
    seen = net(x)
    used = seen.abs().sum(0) > 0
    assert int(used.sum()) == 4
    assert torch.allclose(seen[:, used].std(0), torch.full((4,), math.sqrt(30 / 4)), rtol=1e-3)
    # Each is a monotone function of one summary: of the noise's size, too.
    for column, summary in zip(seen[:, used].T, given(x).T):
        assert torch.equal(column.argsort(), summary.argsort())
    mixed = given.join(given(x), given.split(x.flip(0))[1])
    assert torch.allclose(net(mixed), seen, atol=1e-3)
    net.load_state_dict(plain)
    assert torch.equal(net(x), before)


def test_one_wild_simulation_does_not_squeeze_the_others():
    torch.manual_seed(0)
    net, x = wide_input()
    given = summaries(60, 3)
    net.use_summaries(given, x)
    wild = x.clone()
    wild[0] = 1e4
    expected = net(x[1:]).std(0)
    net.use_summaries(given, wild)
    assert torch.all(net(x[1:]).std(0) >= 0.6 * expected)

"""Draws of x look like simulations: their support, and how many of those asked for are kept."""

import pytest
import torch
from sbi.utils import BoxUniform
from torch import Tensor, nn

from sbi_jeffreys import FlowExpert, LikelihoodProxy, RegressionExpert
from sbi_jeffreys.networks.fitting import FitConfig, FitResult
from sbi_jeffreys.networks.transforms import MarginalTransform
from sbi_jeffreys.proxies.experts import FittedExpert

PRIOR = BoxUniform(-2 * torch.ones(3), 2 * torch.ones(3))
TRAIN, VAL = torch.arange(300), torch.arange(300, 350)


def bernoulli(num_outputs: int) -> tuple[Tensor, Tensor]:
    theta = PRIOR.sample((350,))
    design = torch.randn(3, num_outputs, generator=torch.Generator().manual_seed(3))
    return theta, torch.bernoulli(torch.sigmoid(theta @ design))


@pytest.mark.parametrize(
    "expert", [RegressionExpert(1), FlowExpert("maf", weight_decay=0.3, num_transforms=2)]
)
def test_a_hundred_binary_outputs_stay_binary_and_are_kept(expert):
    theta, x = bernoulli(100)
    proxy = LikelihoodProxy(PRIOR, (expert,), FitConfig(max_epochs=10), num_folds=1)
    proxy.fit(theta, x, TRAIN, VAL)
    drawn, y = proxy.sample_joint(2_000)
    assert len(drawn) == len(y) == 2_000
    assert bool(((y == 0) | (y == 1)).all())
    assert proxy.drawn is not None
    assert proxy.drawn.kept == proxy.drawn.asked == 2_000
    assert proxy.drawn.proposed < 2_000 / 0.95
    assert float((y.mean(0) - x.mean(0)).abs().mean()) < 0.05
    given, y = proxy.sample_given(theta[:200])
    assert len(given) == len(y) == 200


class Spread(nn.Module):
    """N(0, scale²) in every column, whatever z is; some entries replaced."""

    def __init__(self, num_outputs: int, scale: float = 1.0, put: tuple = ()) -> None:
        super().__init__()
        self.num_outputs, self.scale, self.put = num_outputs, scale, put

    def sample(self, shape: torch.Size, z: Tensor) -> Tensor:
        y = self.scale * torch.randn(*shape, len(z), self.num_outputs)
        for columns, value in self.put:
            y[..., :columns] = value
        return y


def expert(net: nn.Module, x: Tensor) -> FittedExpert:
    scale = MarginalTransform.fit(x, choose=False)
    fitted = FittedExpert(net, scale, FitResult(0.0, 1), torch.zeros(1), RegressionExpert(1))
    fitted.set_bounds(x)
    return fitted


@pytest.mark.parametrize(
    ("num_outputs", "columns", "value", "kept"),
    [
        (10, 1, 1.09, True),  # x reaches from −1 to 1; a tenth of the width is 0.2
        (10, 1, 1.25, False),  # up to ten outputs none may be further out
        (100, 10, 1.25, True),  # of a hundred ten may be
        (100, 11, 1.25, False),
        (100, 1, 3.1, False),  # by more than the width of the box none may be
        (100, 1, float("nan"), False),
        (10, 1, float("nan"), False),
    ],
)
def test_which_draws_are_plausible(num_outputs, columns, value, kept):
    x = 2 * torch.rand(1_000, num_outputs) - 1
    x[0], x[1] = -1.0, 1.0
    net = Spread(num_outputs, scale=0.1, put=((columns, value),))
    _, plausible = expert(net, x).sample(torch.zeros(50, 3))
    assert plausible.tolist() == [kept] * 50


@pytest.mark.parametrize("num_outputs", [2, 100])
def test_a_plausible_draw_is_not_rarer_where_x_is_wider(num_outputs):
    """Fresh simulations are plausible, however many outputs they have."""
    x = torch.randn(500, num_outputs)
    _, plausible = expert(Spread(num_outputs), x).sample(torch.zeros(2_000, 3))
    assert float(plausible.double().mean()) > 0.98


def test_few_integers_are_clamped_and_many_stay_integers():
    torch.manual_seed(0)
    x = torch.stack([torch.randint(0, 3, (500,)), torch.randint(0, 400, (500,))], dim=1).float()
    net = Spread(2, put=((1, 3.3),))  # of the first column, whose cells end at 3
    draws, plausible = expert(net, x).sample(torch.zeros(20, 3))
    assert bool((draws[:, 0] == 2).all())
    assert torch.equal(draws, draws.round())
    assert bool(plausible.all())


def test_a_shortfall_is_a_value():
    """Of an estimator that is plausible in half of its draws, twice as many are drawn."""
    theta, x = PRIOR.sample((350,)), torch.rand(350, 2)
    proxy = LikelihoodProxy(PRIOR, (RegressionExpert(1),), num_folds=1).fit(theta, x, TRAIN, VAL)
    inner = proxy.fitted[0]

    class Half(nn.Module):
        share = 0.5

        def sample(self, shape, z):
            keep = torch.rand(*shape, len(z), 1) < self.share
            return torch.where(keep, 0.5, torch.nan).expand(*shape, len(z), 2)

    inner.net = Half()
    assert len(proxy.sample_joint(1_000)[0]) >= 900
    assert proxy.drawn is not None
    assert proxy.drawn.proposed == pytest.approx(2_000, rel=0.15)
    Half.share = 0.01  # an estimator that only extrapolates: no further draws
    kept = len(proxy.sample_joint(1_000)[0])
    assert kept < 30
    assert (proxy.drawn.asked, proxy.drawn.proposed, proxy.drawn.kept) == (1_000, 1_000, kept)


def test_pairs_of_all_experts_are_mixed_and_in_the_order_of_theta():
    """The first 500 pairs hold as many of each expert as its weight says; 4 errors are 0.08."""
    torch.manual_seed(0)
    theta, x = PRIOR.sample((350,)), torch.rand(350, 2)
    proxy = LikelihoodProxy(PRIOR, (RegressionExpert(1),), num_folds=1).fit(theta, x, TRAIN, VAL)
    nets = [Spread(2, scale=0.01, put=((1, value),)) for value in (0.2, 0.8)]
    proxy.fitted = nn.ModuleList([expert(net, x) for net in nets])
    proxy.weights = torch.tensor([0.25, 0.75])
    given = PRIOR.sample((5_000,))
    for pairs in (proxy.sample_given(given), proxy.sample_joint(5_000)):
        of_the_second = pairs[1][:, 0] > 0.5
        assert float(of_the_second[:500].float().mean()) == pytest.approx(0.75, abs=0.08)
        assert len(pairs[0]) == 5_000
    assert torch.equal(proxy.sample_given(given)[0], given)

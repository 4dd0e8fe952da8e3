"""Neural regressions against likelihoods in closed form: curves, counts and binary outputs."""

import math

import pytest
import torch
from sbi.utils import BoxUniform
from torch import Tensor, nn

from sbi_jeffreys import FlowExpert, LikelihoodProxy, NeuralRegressionExpert
from sbi_jeffreys.networks.fitting import FitConfig, FitResult
from sbi_jeffreys.networks.transforms import MarginalTransform
from sbi_jeffreys.proxies.experts import FittedExpert
from sbi_jeffreys.proxies.experts.neural import NeuralRegression

PRIOR = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
TRAIN, VAL = torch.arange(720), torch.arange(720, 800)
TIMES = torch.linspace(0, 1, 40)


def curve(theta: Tensor) -> Tensor:
    return torch.exp(theta[:, :1] / 2) * torch.sin(2 * TIMES + theta[:, 1:])


def fitted(expert: NeuralRegressionExpert, theta: Tensor, x: Tensor) -> LikelihoodProxy:
    proxy = LikelihoodProxy(PRIOR, (expert,), FitConfig(max_epochs=100), num_folds=1)
    return proxy.fit(theta, x, TRAIN, VAL)


def test_a_curve_in_white_noise_is_learned_to_a_tenth_of_its_noise():
    """The log-likelihood of 40 outputs, next to the true one, on fresh pairs; and draws of x."""
    torch.manual_seed(0)
    theta = PRIOR.sample((800,))
    x = curve(theta) + 0.2 * torch.randn(800, 40)
    proxy = fitted(NeuralRegressionExpert(), theta, x)
    fresh = PRIOR.sample((300,))
    y = curve(fresh) + 0.2 * torch.randn(300, 40)
    truth = torch.distributions.Normal(curve(fresh), 0.2).log_prob(y).sum(-1)
    missed = truth - proxy.log_factor(fresh.unsqueeze(0), y)[0]
    assert 0 < float(missed.mean()) < 2.0  # of the 40 squared errors' 20 nats
    drawn, y = proxy.sample_given(fresh)
    assert float((y - curve(drawn)).std()) == pytest.approx(0.2, rel=0.1)


def two_signals(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Means of two signals of 20 samples; noise grows with θ_1 in one, and falls in the other."""
    signs = torch.tensor([1.0, -1.0]).repeat_interleave(20)
    return curve(theta), 0.2 * (signs * theta[:, :1]).exp()


def test_two_signals_have_noise_levels_of_their_own():
    """A noise level that all outputs share cannot rise in one signal and fall in the other."""
    torch.manual_seed(0)
    theta, fresh = PRIOR.sample((800,)), PRIOR.sample((300,))
    mean, deviation = two_signals(theta)
    x = mean + deviation * torch.randn(800, 40)
    mean, deviation = two_signals(fresh)
    y = mean + deviation * torch.randn(300, 40)
    truth = torch.distributions.Normal(mean, deviation).log_prob(y).sum(-1)

    def missed(own_noise: bool) -> float:
        proxy = fitted(NeuralRegressionExpert(own_noise=own_noise), theta, x)
        return float((truth - proxy.log_factor(fresh.unsqueeze(0), y)[0]).mean())

    assert missed(own_noise=True) < 10.0  # of the 40 squared errors' 20 nats
    assert missed(own_noise=False) > 20.0


def test_a_single_output_has_no_noise_levels_of_several_outputs():
    torch.manual_seed(0)
    theta = PRIOR.sample((100,))
    both = NeuralRegressionExpert(), NeuralRegressionExpert(own_noise=True)
    for dim, num_fitted in ((1, 1), (2, 2)):
        x = theta[:, :dim] + torch.randn(100, dim)
        config = FitConfig(max_epochs=2)
        proxy = LikelihoodProxy(PRIOR, both, config, num_folds=1)
        proxy.fit(theta, x, torch.arange(90), torch.arange(90, 100))
        assert len(proxy.results) == num_fitted


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["binary", "counts"])
def test_integers_have_the_probability_of_their_cell(scale):
    """Probabilities of all values sum to one, and are those of the simulator."""
    torch.manual_seed(0)
    theta = PRIOR.sample((800,))
    rate = torch.sigmoid(theta[:, :1])
    x = torch.distributions.Binomial(int(scale), rate).sample()
    x = torch.cat([x, torch.distributions.Binomial(int(scale), 1 - rate).sample()], dim=1)
    proxy = fitted(NeuralRegressionExpert(num_layers=1, hidden_features=32), theta, x)
    at = torch.tensor([[-1.0, 0.0], [0.5, 1.0], [1.5, -1.0]])
    values = torch.arange(2.0 if scale == 1 else 2 * scale)  # it does not know the largest count
    grid = torch.cartesian_prod(values, values)
    probability = proxy.log_factor(
        at.unsqueeze(1).expand(3, len(grid), 2), grid
    ).exp()  # of every pair of values at each θ
    assert torch.allclose(probability.sum(dim=1), torch.ones(3), atol=0.02)
    mean = (probability @ grid)[:, 0]
    assert torch.allclose(mean, scale * torch.sigmoid(at[:, 0]), atol=0.07 * scale)


def test_the_lowest_of_many_counts_is_a_count_and_no_limit():
    """Counts of 300 ± 20 at one θ: below the lowest one seen there are more of them."""
    torch.manual_seed(0)
    theta = PRIOR.sample((800,))
    x = torch.poisson(300 + 50 * theta[:, :1])
    proxy = fitted(NeuralRegressionExpert(num_layers=1, hidden_features=32), theta, x)
    lowest = float(x.min())
    at = theta[x[:, 0].argmin()].reshape(1, 1, 2)
    values = torch.stack([torch.tensor([lowest]), torch.tensor([lowest + 1])])
    at_lowest, above = proxy.log_factor(at.expand(1, 2, 2), values)[0].tolist()
    # Neighbours have nearly the same probability; an open cell would have several times as much.
    assert abs(at_lowest - above) < 0.5


class PeakedInTheMiddle(nn.Module):
    """A density that is eight times too high in the middle eighth of each cell, and else zero."""

    def log_prob(self, y: Tensor, z: Tensor) -> Tensor:
        inside = (y % 1 - 0.5).abs() < 1 / 16
        return torch.where(inside, math.log(8.0), -20.0).sum(dim=-1)


def test_a_net_that_is_peaked_in_the_middle_of_cells_gains_nothing_by_it():
    torch.manual_seed(0)
    x = torch.randint(0, 9, (2_000, 1)).float()
    plain = MarginalTransform.fit(x, choose=False)
    net = PeakedInTheMiddle()
    expert = FittedExpert(net, plain, FitResult(0.0, 0), torch.zeros(0), FlowExpert())
    assert float(expert.log_prob(x, x).mean()) == pytest.approx(math.log(8.0))
    assert abs(float(expert.log_probability(x, x, num_draws=2_000).exp().mean()) - 1) < 0.05


def test_gradients_are_finite_at_open_ends_and_far_from_the_cell():
    torch.manual_seed(0)
    x = torch.tensor([[0.0], [1.0], [0.0], [1.0], [1.0]])
    z = 100 * torch.randn(5, 2)
    transform = MarginalTransform.fit(x)
    net = NeuralRegression(z / 100, x, transform, 8, 1)
    loss = net.loss(transform(x), z).mean()
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    for parameter in net.parameters():
        assert parameter.grad is not None
        assert bool(torch.isfinite(parameter.grad).all())


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_features", 0), ("num_layers", -1), ("weight_decay", -0.1)]
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        NeuralRegressionExpert(**{field: value})


def test_bad_noise_settings_are_named():
    with pytest.raises(TypeError, match="own_noise"):
        NeuralRegressionExpert(own_noise=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="own_noise=True needs hidden layers, got num_layers=0"):
        NeuralRegressionExpert(num_layers=0, own_noise=True)


def test_draws_of_rare_counts_are_kept_at_every_theta():
    """Where a count is surely zero, its normal is far below zero: no reason to drop the draw."""
    torch.manual_seed(0)
    theta = PRIOR.sample((800,))
    x = torch.poisson((4 * theta.repeat(1, 2)).exp().clamp_max(300))
    proxy = fitted(NeuralRegressionExpert(), theta, x)
    at = torch.full((400, 2), -1.8)
    drawn, y = proxy.sample_given(at)
    assert proxy.drawn is not None
    assert proxy.drawn.proposed == len(drawn) == 400
    assert float((y == 0).float().mean()) > 0.95

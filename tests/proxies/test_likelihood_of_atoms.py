"""Likelihoods of outputs with atoms against those in closed form: zeros, and censoring."""

import math

import pytest
import torch
from sbi.utils import BoxUniform
from torch import Tensor
from torch.distributions import Normal

from sbi_jeffreys import FlowExpert, LikelihoodProxy, NeuralRegressionExpert, RegressionExpert
from sbi_jeffreys.networks.fitting import FitConfig, FitResult
from sbi_jeffreys.networks.transforms import MarginalTransform
from sbi_jeffreys.proxies.experts import FittedExpert, fit
from sbi_jeffreys.proxies.experts.neural import NeuralRegression

PRIOR = BoxUniform(-2 * torch.ones(1), 2 * torch.ones(1))
NOISE = 0.5
AT = torch.tensor([[-1.5], [0.0], [1.5]])


def with_zeros(theta: Tensor) -> Tensor:
    """Zero with probability sigmoid(θ), else log-normal about θ."""
    positive = (theta + NOISE * torch.randn(len(theta), 1)).exp()
    return torch.where(torch.rand(len(theta), 1) < torch.sigmoid(theta), 0.0, positive)


def censored(theta: Tensor) -> Tensor:
    """A normal about θ, cut off below −1 and above 1."""
    return (theta + NOISE * torch.randn(len(theta), 1)).clamp(-1.0, 1.0)


def fitted(expert: FlowExpert | NeuralRegressionExpert, simulate, epochs: int) -> LikelihoodProxy:
    torch.manual_seed(0)
    theta = PRIOR.sample((1_500,))
    proxy = LikelihoodProxy(PRIOR, (expert,), FitConfig(max_epochs=epochs), num_folds=1)
    return proxy.fit(theta, simulate(theta), torch.arange(1_350), torch.arange(1_350, 1_500))


def probability(proxy: LikelihoodProxy, value: float) -> Tensor:
    """∫ of the density of T(x) over the cell of an atom, for θ = AT."""
    expert = proxy.fitted[0]
    assert isinstance(expert, FittedExpert)
    x = torch.full((len(AT), 1), value)
    return expert.log_probability(x, proxy.theta_transform(AT), num_draws=400).exp()


def density(proxy: LikelihoodProxy, grid: Tensor) -> Tensor:
    """ℓ of a grid of x `(K,)`, `(3, K)`."""
    theta = AT.unsqueeze(1).expand(3, len(grid), 1)
    return proxy.log_factor(theta, grid.unsqueeze(1)).exp()


@pytest.fixture(scope="module")
def zeros() -> LikelihoodProxy:
    return fitted(FlowExpert("nsf", 0.3, 2e-3, num_transforms=3), with_zeros, 60)


def test_a_flow_has_the_probability_of_zero_and_a_density_of_the_rest(zeros):
    torch.manual_seed(0)
    truth, found = torch.sigmoid(AT[:, 0]), probability(zeros, 0.0)
    torch.testing.assert_close(found, truth, atol=0.05, rtol=0)
    grid = torch.linspace(-6, 6, 4_001).exp()
    rest = torch.trapezoid(density(zeros, grid) * grid, grid.log())
    torch.testing.assert_close(rest, 1 - found, atol=0.05, rtol=0)
    near = (AT[:, 0] + torch.tensor([0.0, 0.3, -0.3])).exp()
    exact = Normal(AT[:, 0], NOISE).log_prob(near.log()) - near.log() + torch.log1p(-truth)
    # At the last θ, four in five are zero: hardly any values to learn a density from.
    own = density(zeros, near).diagonal().log()
    torch.testing.assert_close(own[:2], exact[:2], atol=0.3, rtol=0)


def test_draws_have_the_share_of_exact_zeros(zeros):
    torch.manual_seed(0)
    theta, x = zeros.sample_given(AT.repeat_interleave(2_000, dim=0))
    assert len(x) > 5_900
    for at in AT[:, 0]:
        share = float((x[theta == at] == 0).float().mean())
        assert share == pytest.approx(float(torch.sigmoid(at)), abs=0.05)
    positive = x[(theta == 0.0) & (x != 0)].log()
    assert float(positive.mean()) == pytest.approx(0.0, abs=0.15)
    low, high = positive.quantile(0.16), positive.quantile(0.84)
    assert float(high - low) / 2 == pytest.approx(NOISE, rel=0.2)


def test_a_neural_regression_of_censored_outputs_is_a_tobit_model():
    proxy = fitted(NeuralRegressionExpert(num_layers=0), censored, 150)
    latent = Normal(AT[:, 0], NOISE)
    low, high = probability(proxy, -1.0), probability(proxy, 1.0)
    torch.testing.assert_close(low, latent.cdf(torch.tensor(-1.0)), atol=0.04, rtol=0)
    torch.testing.assert_close(high, 1 - latent.cdf(torch.tensor(1.0)), atol=0.04, rtol=0)
    grid = torch.linspace(-0.999, 0.999, 2_001)
    rest = torch.trapezoid(density(proxy, grid), grid)
    torch.testing.assert_close(rest + low + high, torch.ones(3), atol=0.02, rtol=0)
    torch.manual_seed(0)
    theta, x = proxy.sample_given(AT.repeat_interleave(2_000, dim=0))
    share = (x[theta == 0.0] == 1.0).float().mean()
    assert float(share) == pytest.approx(float(1 - latent.cdf(torch.tensor(1.0))[1]), abs=0.04)
    assert bool((x.abs() <= 1.0).all())


def test_experts_are_compared_by_the_cell_of_an_atom():
    """A density that is eight times too high in the middle eighth of the cell gains nothing."""
    torch.manual_seed(0)
    x = with_zeros(torch.zeros(2_000, 1))
    transform = MarginalTransform.fit(x)
    middle, width = transform(torch.zeros(1, 1)), transform.atoms.width

    class Peaked(torch.nn.Module):
        def log_prob(self, y: Tensor, z: Tensor) -> Tensor:
            inside = (y - middle).abs() < width / 16
            return torch.where(inside, 8.0 / width, 1e-9).log().sum(dim=-1)

    expert = FittedExpert(Peaked(), transform, FitResult(0.0, 0), torch.zeros(0), FlowExpert())
    zero = torch.zeros(200, 1)
    assert float(expert.log_prob(zero, zero).mean()) == pytest.approx(math.log(8.0))
    assert float(expert.log_probability(zero, zero, 200).exp().mean()) == pytest.approx(1, abs=0.05)


def test_an_atom_is_plausible_wherever_in_its_cell_it_is_drawn():
    torch.manual_seed(0)
    x = with_zeros(torch.zeros(500, 1))
    transform = MarginalTransform.fit(x)

    class Far(torch.nn.Module):
        def sample(self, shape: torch.Size, z: Tensor) -> Tensor:
            return torch.tensor([[-60.0], [60.0]]).expand(*shape, 2, 1)

    expert = FittedExpert(Far(), transform, FitResult(0.0, 0), torch.zeros(0), FlowExpert())
    expert.set_bounds(x)
    drawn, plausible = expert.sample(torch.zeros(2, 1))
    assert drawn[0].tolist() == [0.0]
    assert plausible.tolist() == [True, False]


def test_gradients_are_finite_at_open_cells():
    torch.manual_seed(0)
    x = censored(3 * torch.randn(400, 1))
    z = 100 * torch.randn(400, 2)
    transform = MarginalTransform.fit(x)
    net = NeuralRegression(z / 100, x, transform, 8, 1)
    net.loss(transform(x), z).mean().backward()
    for parameter in net.parameters():
        assert parameter.grad is not None
        assert bool(torch.isfinite(parameter.grad).all())


def test_parameters_with_atoms_have_no_cells_as_conditions():
    """A jump of z at θ = 0 would be one of a likelihood that is smooth there."""
    torch.manual_seed(0)
    theta = torch.where(torch.rand(200, 1) < 0.5, 0.0, PRIOR.sample((200,)))
    x = theta + 0.1 * torch.randn(200, 1)
    proxy = LikelihoodProxy(PRIOR, (RegressionExpert(1),), num_folds=1)
    proxy.fit(theta, x, torch.arange(180), torch.arange(180, 200))
    z = proxy.theta_transform(torch.tensor([[-0.01], [0.0], [0.01]]))
    assert float((z[2] - z[0]).abs()) < 0.1


def test_spline_flows_are_tried_before_smooth_ones_can_fail(monkeypatch):
    """Smooth flows of x with zeros lose to regressions, after which no flow is fitted any more."""
    tried, original = [], fit._fit

    def spy(specs, folds, fits):
        tried.extend(spec.name for spec in specs)
        original(specs, folds, fits)

    monkeypatch.setattr(fit, "_fit", spy)
    flows = (
        FlowExpert(around_regression=True, num_transforms=1),
        FlowExpert(num_transforms=1),
        FlowExpert("nsf", num_transforms=1),
    )
    torch.manual_seed(0)
    theta = PRIOR.sample((200,))
    for x, first in ((with_zeros(theta), "nsf"), (theta + 1.0, "maf of residuals")):
        tried.clear()
        rows = torch.arange(200)
        experts = (RegressionExpert(1), *flows)
        fit.fit_experts(experts, FitConfig(max_epochs=1), theta, x, rows[:150], rows[150:])
        assert tried[:2] == ["linear", first]

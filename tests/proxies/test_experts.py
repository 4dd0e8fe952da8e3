"""Experts of the likelihood proxy: regressions against least squares, and who is fitted at all."""

import math

import pytest
import torch
from sbi.neural_nets import likelihood_nn
from torch.distributions import MultivariateNormal

from sbi_jeffreys import FlowExpert, JeffreysOptions, RegressionExpert
from sbi_jeffreys.networks import together
from sbi_jeffreys.networks.fitting import FitConfig, FitResult
from sbi_jeffreys.proxies import LikelihoodProxy
from sbi_jeffreys.proxies.experts import base, fit
from sbi_jeffreys.proxies.experts import flow as _flow
from sbi_jeffreys.proxies.experts.fit import fit_experts, inexpensive_won
from sbi_jeffreys.proxies.experts.gaussian import AroundRegression, GaussianRegression

MATRIX = torch.tensor([[1.0, 0.5, 0.0], [0.0, -2.0, 1.0]])
NOISE = torch.tensor([[0.3, 0.0, 0.0], [0.2, 0.1, 0.0], [0.0, 0.0, 0.5]])  # Cholesky factor
QUICK = FitConfig(max_epochs=30, batch_size=100)


def linear(num: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = 3 + 2 * torch.rand(num, 2, generator=generator)
    return z, z @ MATRIX + 10 + torch.randn(num, 3, generator=generator) @ NOISE.T


def quadratic(num: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    z, y = linear(num, seed)
    return z, y + (z[:, :1] - 4) * (z[:, 1:] - 4)


@pytest.mark.parametrize(("simulate", "degree"), [(linear, 1), (linear, 2), (quadratic, 2)])
def test_regression_finds_the_simulators_likelihood(simulate, degree):
    z, y = simulate(4000)
    net = GaussianRegression(2, 3, degree).fit(z, y)
    z, y = simulate(2000, seed=1)
    exact_mean = z @ MATRIX + 10
    if simulate is quadratic:
        exact_mean = exact_mean + (z[:, :1] - 4) * (z[:, 1:] - 4)
    exact = MultivariateNormal(exact_mean, scale_tril=NOISE).log_prob(y)
    # p parameters fitted to N pairs cost p / 2N nats: at most 24 / 8000.
    assert float((exact - net.log_prob(y.unsqueeze(0), z)[0]).mean()) == pytest.approx(0, abs=0.01)


def test_a_line_does_not_fit_a_parabola():
    z, y = quadratic(2000)
    losses = [float(GaussianRegression(2, 3, d).fit(z, y).loss(y, z).mean()) for d in (1, 2)]
    assert losses[0] > losses[1] + 0.3


def test_regression_with_more_features_than_data_predicts_no_worse_than_the_marginal():
    """Noise alone: the ridge has to shrink 66 coefficients of 50 pairs to next to nothing."""
    torch.manual_seed(0)
    z, y = torch.randn(50, 10), torch.randn(50, 8)
    net = GaussianRegression(10, 8, 2).fit(z, y)
    z, y = torch.randn(4000, 10), torch.randn(4000, 8)
    marginal = 8 * (0.5 * math.log(2 * math.pi) + 0.5)
    assert float(net.loss(y, z).mean()) < marginal + 0.8  # least squares: worse by hundreds


def test_covariance_is_positive_definite_in_more_dimensions_than_data():
    torch.manual_seed(0)
    z = torch.randn(20, 1)
    net = GaussianRegression(1, 60, 1).fit(z, z + 0.1 * torch.randn(20, 60))
    assert bool((net.cholesky.diagonal() > 0).all())
    assert math.isfinite(float(net.loss(torch.zeros(1, 60), torch.zeros(1, 1))))


def test_whitening_is_inverted_and_its_determinant_counted():
    z, y = quadratic(500)
    net = GaussianRegression(2, 3, 2).fit(z, y)
    e = net.whiten(y, z)
    torch.testing.assert_close(net.colour(e, z), y, rtol=1e-4, atol=1e-4)
    jacobian = torch.autograd.functional.jacobian(lambda v: net.whiten(v, z[:1])[0], y[:1])
    assert float(torch.linalg.slogdet(jacobian.reshape(3, 3))[1]) == pytest.approx(
        float(net.log_det(z[:1])), abs=1e-3
    )
    draws = net.sample(torch.Size((4000,)), z[:1])[:, 0]
    torch.testing.assert_close(draws.mean(0), net.mean(z[:1])[0], atol=0.05, rtol=0)
    torch.testing.assert_close(torch.cov(draws.T), NOISE @ NOISE.T, atol=0.03, rtol=0)


def test_a_net_around_a_regression_is_a_density_of_y():
    """With a standard normal for a net it is the regression itself, and its draws are its own."""
    z, y = linear(500)
    regression = GaussianRegression(2, 3, 1).fit(z, y)
    standard = GaussianRegression(2, 3, 1)  # zero mean, unit covariance: as it is before a fit
    net = AroundRegression(standard, regression)
    torch.testing.assert_close(net.loss(y, z), regression.loss(y, z))
    torch.testing.assert_close(net.log_prob(y.unsqueeze(0), z), regression.log_prob(y[None], z))
    torch.manual_seed(1)
    ours = net.sample(torch.Size((1,)), z)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, regression.sample(torch.Size((1,)), z))


def test_the_regression_is_what_a_net_around_it_models():
    """Whitened residuals of linear data are standard normal, and one epoch on them is enough."""
    z, x = linear(300)
    specs = (FlowExpert("maf", num_transforms=1, around_regression=True),)
    train, val = torch.arange(250), torch.arange(250, 300)
    (expert,) = fit_experts(specs, FitConfig(max_epochs=1), z, x, train, val)
    assert isinstance(expert.net, AroundRegression)
    regression = expert.net.regression
    e = regression.whiten(x[train], z[train], regression.leave_one_out)  # as the net was trained
    torch.testing.assert_close(torch.cov(e.T), torch.eye(3), atol=0.2, rtol=0)
    exact = MultivariateNormal(z @ MATRIX + 10, scale_tril=NOISE).log_prob(x)[250:].mean()
    assert expert.result.held_out == pytest.approx(-float(exact), abs=0.4)  # after one epoch


def test_a_regression_wins_where_it_beats_the_net_and_its_residuals_hold_nothing_more():
    torch.manual_seed(0)
    base, noise = torch.randn(100), 0.1 * torch.randn(100)
    best = RegressionExpert(1), base
    same = FlowExpert(around_regression=True), base + noise
    found_more = FlowExpert(around_regression=True), base + noise + 0.1
    worse = FlowExpert(), base + noise - 0.1
    failed = FlowExpert(), torch.full((100,), -math.inf)
    assert inexpensive_won([best, same, worse])
    assert not inexpensive_won([best, same])  # a net of x itself was not asked yet
    assert not inexpensive_won([best, worse])
    assert not inexpensive_won([best, found_more, worse])
    assert not inexpensive_won([best, same, (FlowExpert(), base + noise)])
    assert not inexpensive_won([same, worse])
    assert not inexpensive_won([best, same, failed])


def test_nets_are_not_fitted_where_a_regression_has_won():
    z, x = linear(300)
    train, val = torch.arange(150), torch.arange(150, 300)
    specs = (
        FlowExpert("maf", 0.3, around_regression=True),
        FlowExpert("maf"),
        FlowExpert("maf", 1.0),
        FlowExpert("nsf"),
    )
    torch.manual_seed(0)
    experts = fit_experts((RegressionExpert(1), *specs), QUICK, z, x, train, val)
    assert [m.spec for m in experts] == [RegressionExpert(1), *specs[:2]]
    torch.manual_seed(0)
    assert len(fit_experts(specs, QUICK, z, x, train, val)) == 4


def test_a_net_that_is_fitted_alone_races_the_best_of_its_like(monkeypatch):
    """The bar is that of the net which was best after twenty epochs, of x or of residuals."""
    early, bars = iter([5.0, 2.0, 9.0, 3.0]), []

    def fit(net, loss, train, val, config, on_epoch, abandon_above):
        bars.append(abandon_above)
        return FitResult(1.0, 150, next(early))

    monkeypatch.setattr(together, "fit_network", fit)
    z, x = linear(60)
    around = FlowExpert("maf_rqs", 0.3, around_regression=True)
    plain = FlowExpert("maf_rqs"), FlowExpert("maf_rqs", 0.3), FlowExpert("maf_rqs", 1.0)
    fit_experts((around, *plain), QUICK, z, x, torch.arange(40), torch.arange(40, 60))
    assert bars == [math.inf, math.inf, 2.5, 2.5]  # 2 + half of 2 − 1


@pytest.mark.parametrize("model", ["maf", "nsf"])
def test_flows_are_fitted_in_waves(model, monkeypatch):
    """One flow of x and one of residuals, then the rest; together where vmap takes them."""
    calls, original = [], fit.fit_networks

    def spy(prepared, on_epoch, together):
        calls.append(([one.task.config.weight_decay for one in prepared], together))
        assert all(one.task.abandon_above == math.inf for one in prepared) or not together
        return original(prepared, on_epoch, together)

    monkeypatch.setattr(fit, "fit_networks", spy)
    z, x = linear(60)
    config = FitConfig(max_epochs=20, patience=20)
    specs = [FlowExpert(model, decay, num_transforms=1) for decay in (0.1, 0.2, 0.3)]
    specs.append(FlowExpert(model, 0.4, num_transforms=1, around_regression=True))
    fit_experts(specs, config, z, x, torch.arange(40), torch.arange(40, 60))
    if model == "maf":
        assert calls == [([0.1, 0.4], True), ([0.2, 0.3], True)]
    else:
        assert calls == [([decay], False) for decay in (0.1, 0.2, 0.3, 0.4)]


def test_flows_of_one_architecture_are_fitted_in_one_pass(monkeypatch):
    sizes, original = [], base.fit_together

    def spy(tasks, on_epoch):
        sizes.append(len(tasks))
        return original(tasks, on_epoch)

    monkeypatch.setattr(base, "fit_together", spy)
    z, x = linear(60)
    specs = [FlowExpert("maf", decay, num_transforms=1) for decay in (0.1, 0.2, 0.3)]
    fit_experts(specs, FitConfig(max_epochs=1), z, x, torch.arange(40), torch.arange(40, 60))
    assert sizes == [1, 2]


@pytest.mark.parametrize(("model", "passed"), [("maf", True), ("mdn", False), ("made", False)])
def test_an_expert_that_is_no_flow_has_no_transforms(model, passed, monkeypatch):
    """sbi after 0.27 refuses a number of transforms for mdn and made."""
    settings = []

    def recorded(model, **given):
        settings.append(given)
        return likelihood_nn(model, **given)

    monkeypatch.setattr(_flow, "likelihood_nn", recorded)
    z, x = linear(60)
    spec, config = FlowExpert(model, num_transforms=2), FitConfig(max_epochs=1)
    fit_experts((spec,), config, z, x, torch.arange(40), torch.arange(40, 60))
    assert settings == [{"num_transforms": 2} if passed else {}]


@pytest.mark.slow
def test_the_proxy_follows_the_regression_where_that_is_the_simulator():
    z, x = linear(700)
    prior = torch.distributions.Independent(
        torch.distributions.Uniform(torch.full((2,), 3.0), torch.full((2,), 5.0)), 1
    )
    torch.manual_seed(0)
    proxy = LikelihoodProxy(prior, config=QUICK).fit(
        z, x, torch.arange(600), torch.arange(600, 700)
    )
    theta, x = linear(2000, seed=1)
    exact = MultivariateNormal(theta @ MATRIX + 10, scale_tril=NOISE).log_prob(x)
    with torch.no_grad():
        kl = float((exact - proxy.log_factor(theta.unsqueeze(0), x)[0]).mean())
    assert 0 <= kl + 0.005 < 0.05  # the best of the nets alone: 0.1
    theta, x = proxy.sample_joint(5000)
    residuals = x - theta @ MATRIX - 10
    torch.testing.assert_close(torch.cov(residuals.T), NOISE @ NOISE.T, atol=0.03, rtol=0)


def test_a_quadratic_that_the_data_cannot_carry_is_not_fitted():
    torch.manual_seed(0)
    z, x = torch.randn(60, 10), torch.randn(60, 2)
    train, val = torch.arange(50), torch.arange(50, 60)
    both = (RegressionExpert(1), RegressionExpert(2))
    specs = (*both, FlowExpert("maf", num_transforms=1, around_regression=True))
    quick = FitConfig(max_epochs=1)
    experts = fit_experts(specs, quick, z, x, train, val)
    assert [m.spec for m in experts] == [both[0], specs[2]]
    assert [m.spec for m in fit_experts(both[1:], quick, z, x, train, val)] == [both[1]]


@pytest.mark.parametrize("degree", [0, 3, "linear"])
def test_other_degrees_are_refused(degree):
    with pytest.raises(ValueError, match="degree must be 1 or 2"):
        RegressionExpert(degree)


def test_experts_of_another_type_are_refused():
    with pytest.raises(TypeError, match="FlowExpert, NeuralRegressionExpert, RegressionExpert"):
        JeffreysOptions(experts=("maf",))  # type: ignore[arg-type]

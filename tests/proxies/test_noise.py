"""Noise that is a mixture of Gaussians: against truth, and the regression's mean under it."""

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from sbi_jeffreys import FlowExpert, RegressionExpert
from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.networks.transforms import MarginalTransform
from sbi_jeffreys.proxies.experts import gaussian as _gaussian
from sbi_jeffreys.proxies.experts import noise
from sbi_jeffreys.proxies.experts.base import ExpertData
from sbi_jeffreys.proxies.experts.fit import fit_experts
from sbi_jeffreys.proxies.experts.gaussian import AroundRegression, GaussianRegression
from sbi_jeffreys.proxies.experts.kernel import KernelRegression
from sbi_jeffreys.proxies.experts.noise import NoiseMixture, fit_noise

NOTHING = torch.zeros(1, 1)


def two_levels(mean: torch.Tensor) -> MixtureSameFamily:
    """Noise of standard deviation 2 or 0.1, one in four and three in four."""
    scale = torch.tensor([2.0, 0.1]).unsqueeze(-1)
    parts = Independent(Normal(mean.unsqueeze(-2), scale), 1)
    return MixtureSameFamily(
        Categorical(torch.tensor([0.25, 0.75]).expand(parts.batch_shape)), parts
    )


def mean(z: torch.Tensor) -> torch.Tensor:
    return torch.stack([z[:, 0] + 0.5 * z[:, 1] ** 2, 2 * z[:, 1] - z[:, 0]], dim=1)


def glitches(num: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    z = 4 * torch.rand(num, 2) - 2
    return z, two_levels(mean(z)).sample()


def test_density_and_draws_are_those_of_the_noise():
    torch.manual_seed(0)
    exact = two_levels(torch.tensor([0.3, -0.2]))
    net, e = NoiseMixture(exact.sample(torch.Size((4000,)))), exact.sample(torch.Size((4000,)))
    # 5 parameters per component, 1 for the weight: 11 / 8000 nats on average.
    gap = exact.log_prob(e) - net.log_prob(e, NOTHING)
    assert len(net.means) == 2
    assert float(gap.mean()) == pytest.approx(0.0, abs=0.01)
    draws = net.sample(torch.Size((2000,)), torch.zeros(2, 1))
    assert draws.shape == (2000, 2, 2)
    both = exact.log_prob(draws).flatten(), exact.log_prob(e)
    error = math.sqrt(sum(float(v.var()) / len(v) for v in both))
    assert float(both[0].mean() - both[1].mean()) == pytest.approx(0.0, abs=4 * error)


def test_draws_have_correlations():
    torch.manual_seed(0)
    factor = torch.tensor([[1.0, 0.0], [0.8, 0.1]])
    wide = torch.rand(3000, 1) < 0.3
    e = torch.where(wide, 5.0, 1.0) * torch.randn(3000, 2) @ factor.T
    net = NoiseMixture(e)
    assert len(net.means) > 1
    draws = net.sample(torch.Size((20_000,)), NOTHING)[:, 0]
    torch.testing.assert_close(torch.corrcoef(draws.T), torch.corrcoef(e.T), atol=0.01, rtol=0)


@pytest.mark.parametrize("finite", [True, False])
def test_gaussian_noise_stays_as_whitening_left_it(finite):
    """Also where residuals are not finite: a failed fit is not this module's to repair."""
    torch.manual_seed(0)
    net = NoiseMixture(torch.randn(400, 3) if finite else torch.full((400, 3), math.nan))
    e = torch.randn(10, 3)
    torch.testing.assert_close(net.log_prob(e, NOTHING), Normal(0, 1).log_prob(e).sum(dim=1))


def test_larger_mixtures_are_not_tried_once_bic_rises(monkeypatch):
    tried = []
    fit = noise.GaussianMixture.fit

    def counted(self, values):
        tried.append(self.n_components)
        return fit(self, values)

    monkeypatch.setattr(noise.GaussianMixture, "fit", counted)
    torch.manual_seed(0)
    net = NoiseMixture(torch.randn(400, 3))
    assert tried == [2]
    assert len(net.means) == 1
    tried.clear()
    centres = 6 * torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    net = NoiseMixture(centres.repeat(100, 1) + torch.randn(400, 2))
    assert tried == [2, 4, 8]
    assert len(net.means) == 4


def test_the_pull_on_the_mean_is_the_gradient_of_the_log_density():
    """Σ r_c p_c (μ_c − e) = w (c − e), exactly where components are isotropic."""
    net = NoiseMixture(torch.randn(50, 2, generator=torch.Generator().manual_seed(0)))
    net.log_weights = torch.tensor([0.2, 0.5, 0.3]).log()
    net.means = torch.tensor([[0.0, 0.0], [1.0, 2.0], [-3.0, 0.5]])
    net.precision_factors = torch.tensor([1.0, 2.0, 0.3])[:, None, None] * torch.eye(2)
    e = torch.tensor([[0.5, 0.5], [2.0, -1.0], [-2.0, 0.1]], requires_grad=True)
    (gradient,) = torch.autograd.grad(net.log_prob(e, NOTHING).sum(), e)
    weights, centre = net.pull(e.detach())
    torch.testing.assert_close(weights.unsqueeze(1) * (centre - e.detach()), gradient)


@pytest.mark.parametrize("kind", ["polynomial", "kernel"])
def test_outliers_hardly_influence_the_mean(kind):
    z, y = glitches(500)
    gaussian = (KernelRegression(2, 2) if kind == "kernel" else GaussianRegression(2, 2, 2)).fit(
        z, y
    )
    fitted = fit_noise(gaussian, z, y)
    assert type(fitted.regression) is type(gaussian)
    z, y = glitches(4000, seed=1)

    def error(net: GaussianRegression, centre: torch.Tensor | None = None) -> float:
        found = net.mean(z) if centre is None else net.colour(centre.expand(len(z), 2), z)
        return float((found - mean(z)).pow(2).mean().sqrt())

    # Least squares: 2 √(1/4 · 6/500) = 0.1; of the quiet pairs alone 0.1 √(6/375) = 0.013.
    assert error(gaussian) > 0.06
    quiet = fitted.net.means[fitted.net.log_weights.argmax()]
    assert error(fitted.regression, quiet) < (0.02 if kind == "polynomial" else 0.04)
    exact = two_levels(mean(z)).log_prob(y).mean()
    gaps = [float(exact - net.log_prob(y.unsqueeze(0), z).mean()) for net in (gaussian, fitted)]
    assert gaps[0] > 1.0
    assert -0.02 < gaps[1] < 0.15


def test_a_second_fit_that_predicts_worse_is_not_taken():
    class Forgetful(GaussianRegression):
        def unfitted(self) -> GaussianRegression:
            return GaussianRegression(2, 2, 1)  # has lost the squares

    z, y = glitches(500)
    regression = Forgetful(2, 2, 2).fit(z, y)
    assert fit_noise(regression, z, y).regression is regression


@pytest.mark.parametrize("net", [GaussianRegression(2, 2, 2), KernelRegression(2, 2)])
def test_pairs_of_no_weight_have_no_influence(net):
    z, y = glitches(200)
    weights = torch.ones(200)
    weights[::10] = 1e-9
    spoilt = y.clone()
    spoilt[::10] += 100.0
    first = net.fit(z, y, weights)
    fits = first, first.unfitted().fit(z, spoilt, weights)
    torch.testing.assert_close(fits[0].mean(z), fits[1].mean(z), atol=1e-2, rtol=0)
    torch.testing.assert_close(fits[0].cholesky, fits[1].cholesky, atol=1e-2, rtol=0)
    expected = fits[1].mean(z)[::10]  # a pair of no weight does not change its own prediction
    torch.testing.assert_close(fits[1].leave_one_out[::10], expected, atol=1e-2, rtol=0)


def test_leave_one_out_residuals_of_weighted_pairs_are_those_of_fits_without_them(monkeypatch):
    monkeypatch.setattr(_gaussian, "_RIDGE_GRID", torch.tensor([0.5], dtype=torch.float64))
    z, y = glitches(40)
    weights = torch.rand(40) + 0.1
    net = GaussianRegression(2, 2, 1).fit(z, y, weights)
    target, shift, spread, root = _gaussian.standardised(y, weights)
    features = root * net._features(z).double()
    for i in (0, 17):
        rest = torch.arange(40) != i
        gram = features[rest].T @ features[rest] + 0.5 * torch.eye(3).double()
        solution = torch.linalg.solve(gram, features[rest].T @ target[rest])
        predicted = (features[i] / root[i]) @ solution * spread + shift
        torch.testing.assert_close(net.leave_one_out[i], predicted.float(), rtol=1e-4, atol=1e-4)


def test_a_mixture_starts_from_the_gaussian_fit_and_is_a_likelihood_of_x():
    z, x = glitches(300)
    spec, scale = RegressionExpert(2, mixture=True), MarginalTransform.fit(x, choose=False)
    rows = torch.arange(300)
    data = ExpertData(z, x, rows, rows, FitConfig(), (scale, scale))
    known = replace(spec, mixture=False).fit(data, ()).net
    assert isinstance(known, GaussianRegression)
    spoilt = known.unfitted().fit(z, -x)
    before = data.fitted(RegressionExpert(2), spoilt, scale)
    own, given = (spec.fit(data, known).net for known in ((), (before,)))
    assert isinstance(own, AroundRegression)
    assert isinstance(given, AroundRegression)
    assert float(own.loss(x, z).mean()) < float(given.loss(x, z).mean()) - 0.1
    draws = own.sample(torch.Size((5,)), z)
    assert draws.shape == (5, 300, 2)


def test_where_it_is_the_model_nets_are_not_fitted_on_and_on():
    z, x = glitches(1000)
    nets = (FlowExpert(around_regression=True), FlowExpert(), FlowExpert(weight_decay=0.3))
    specs = (RegressionExpert(2), RegressionExpert(2, mixture=True), *nets)
    config = FitConfig(max_epochs=10, batch_size=100)
    fitted = fit_experts(specs, config, z, x, torch.arange(800), torch.arange(800, 1000))
    assert [expert.spec for expert in fitted] == list(specs[:4])

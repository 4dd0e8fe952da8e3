"""Sparse regressions, of constant and of varying noise: against truth and against brute force."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import MultivariateNormal

from sbi_jeffreys import RegressionExpert
from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.proxies import LikelihoodProxy
from sbi_jeffreys.proxies.experts.fit import fit_experts
from sbi_jeffreys.proxies.experts.gaussian import AroundRegression, GaussianRegression
from sbi_jeffreys.proxies.experts.heteroscedastic import HeteroscedasticRegression, select_scale
from sbi_jeffreys.proxies.experts.noise import fit_noise
from sbi_jeffreys.proxies.experts.sparse import (
    SparseRegression,
    cross_validated,
    extended_bic,
    select_features,
)
from sbi_jeffreys.proxies.folds import Bag


def design(num: int, num_features: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(num, num_features, generator=generator, dtype=torch.float64)
    return torch.cat([torch.ones(num, 1, dtype=torch.float64), columns], dim=1)


def diagonal(num: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten outputs, each of one of ten parameters, and noise of deviation 0.5."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(num, 10, generator=generator)
    return z, z + 0.5 * torch.randn(num, 10, generator=generator)


def test_the_features_are_those_of_the_lowest_criterion():
    """Features that are nearly orthogonal: greedy choice is the best of all subsets."""
    features = design(60, 6)
    noise = torch.randn(60, 1, generator=torch.Generator().manual_seed(1)).double()
    target = 2 * features[:, [2]] - features[:, [5]] + 0.3 * features[:, [6]] + noise
    found = select_features(features, target)[:, 0]

    def criterion(own: tuple[int, ...]) -> float:
        columns = features[:, [0, *own]]
        fit = columns @ torch.linalg.lstsq(columns, target).solution
        rss = float((target - fit).pow(2).sum())
        choices = 2 * math.log(math.comb(6, len(own)))
        return 60 * math.log(rss / 60) + len(own) * math.log(60) + choices

    subsets = [s for k in range(7) for s in itertools.combinations(range(1, 7), k)]
    best = [0, *min(subsets, key=criterion)]
    assert found.nonzero()[:, 0].tolist() == best
    exact = torch.linalg.lstsq(features[:, best], target).solution[:, 0]
    torch.testing.assert_close(found[best], exact)


def test_the_penalty_is_that_of_the_extended_criterion():
    assert extended_bic(3, 10, 50) == pytest.approx(3 * math.log(50) + 2 * math.log(120))
    assert extended_bic(0, 10, 50) == pytest.approx(0.0)


def test_noise_alone_has_no_features():
    """By BIC without the number of choices, about every second target would have one."""
    target = torch.randn(90, 20, generator=torch.Generator().manual_seed(3)).double()
    found = select_features(design(90, 65), target)
    assert int((found[1:] != 0).sum()) <= 1


def test_a_feature_that_depends_on_the_others_is_not_chosen_twice():
    features = design(80, 3)
    features = torch.cat([features, features[:, [1]] + features[:, [2]]], dim=1)
    target = features[:, [1]] + features[:, [2]] + features[:, [3]]
    found = select_features(features, target)
    torch.testing.assert_close(features @ found, target, atol=1e-6, rtol=0)
    assert bool(torch.isfinite(found).all())


def test_every_pair_is_predicted_by_a_fit_without_it():
    seen = []

    def predict(rest: torch.Tensor, unseen: torch.Tensor) -> torch.Tensor:
        seen.append((set(rest.tolist()), set(unseen.tolist())))
        return unseen.unsqueeze(1)

    assert cross_validated(predict, 23)[:, 0].tolist() == list(range(23))
    assert all(not rest & unseen and len(rest | unseen) == 23 for rest, unseen in seen)


@pytest.mark.parametrize("seed", range(3))
def test_sparse_means_are_found_from_few_pairs(seed):
    """90 pairs, ten outputs: 10 coefficients of consequence, where the dense fit has 110."""
    fits = [kind(10, 10, degree).fit(*diagonal(90, seed)) for kind, degree in (
        (SparseRegression, 2), (GaussianRegression, 1))]  # fmt: skip
    z, y = diagonal(4000, seed + 100)
    exact = 10 * (0.5 * math.log(2 * math.pi) + 0.5 + math.log(0.5))
    sparse, dense = (float(net.loss(y, z).mean()) - exact for net in fits)
    # Asymptotically half a nat for a hundred parameters of mean or variance.
    assert 0.0 < sparse < 0.4
    assert dense > sparse + 0.25


def test_noise_is_that_of_cross_validation():
    """Where features are chosen among many, residuals of the fit itself are too small."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(60, 10, generator=generator)
    y = z @ (0.4 * torch.randn(10, 6, generator=generator))
    y = y + torch.randn(60, 6, generator=generator)
    net = SparseRegression(10, 6, 2).fit(z, y)
    unseen = (y - net.leave_one_out).pow(2).mean()
    assert float((y - net.mean(z)).pow(2).mean()) < 0.8 * float(unseen)
    assert float(net.cholesky.pow(2).sum() / 6) == pytest.approx(float(unseen), rel=0.05)


def test_weighted_pairs_count_as_often():
    z, y = diagonal(60)
    rows = torch.arange(60) % 3 == 0
    net = SparseRegression(10, 10, 1).fit(z, y, torch.where(rows, 1.0, 1e-12))
    own = GaussianRegression(10, 10, 1)
    own.centre, own.scale = net.centre, net.scale
    features = own._features(z)[rows].double()
    for j in range(10):
        used = net.coefficients[:, j] != 0
        used[0] = True
        exact = torch.linalg.lstsq(features[:, used], y[rows][:, [j]].double()).solution[:, 0]
        torch.testing.assert_close(net.coefficients[used, j], exact.float(), atol=1e-3, rtol=0)


def law(z: torch.Tensor) -> MultivariateNormal:
    """Noise levels |z₁| and e^{z₀/2}, whose correlation is tanh(z₂)."""
    mean = torch.stack([z[:, 0], z[:, 0] + 0.5 * z[:, 1] ** 2], dim=1)
    scale = torch.stack([z[:, 1].abs() + 0.02, (0.5 * z[:, 0]).exp()], dim=1)
    rho = torch.tanh(z[:, 2])
    factor = torch.zeros(len(z), 2, 2)
    factor[:, 0, 0], factor[:, 1, 0] = scale[:, 0], scale[:, 1] * rho
    factor[:, 1, 1] = scale[:, 1] * (1 - rho**2).sqrt()
    return MultivariateNormal(mean, scale_tril=factor)


def varying(num: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    z = torch.randn(num, 3)
    return z, law(z).sample()


@pytest.mark.parametrize(("num", "loss"), [(200, 0.5), (1000, 0.25)])
def test_noise_that_depends_on_parameters_is_found(num, loss):
    """Excess loss in nats; the quadratic terms of constant noise lack more than one."""
    z, y = varying(num)
    nets = [kind(3, 2, 2).fit(z, y) for kind in (HeteroscedasticRegression, SparseRegression)]
    z, y = varying(4000, seed=1)
    exact = float(law(z).log_prob(y).mean())
    varies, constant = (exact + float(net.loss(y, z).mean()) for net in nets)
    assert 0.0 < varies < loss
    assert constant > varies + 0.8


def test_correlations_that_depend_on_parameters_are_found():
    z, y = varying(500)
    net = HeteroscedasticRegression(3, 2, 2).fit(z, y)
    at = torch.tensor([[0.0, 1.0, -1.0], [0.0, 1.0, 1.0]])
    draws = net.sample(torch.Size((20_000,)), at)
    torch.manual_seed(0)
    for k, rho in enumerate((-math.tanh(1), math.tanh(1))):
        assert float(torch.corrcoef(draws[:, k].T)[0, 1]) == pytest.approx(rho, abs=0.15)


def test_its_whitening_is_inverted_and_its_determinant_counted():
    z, y = varying(300)
    net = HeteroscedasticRegression(3, 2, 2).fit(z, y)
    e = net.whiten(y, z)
    torch.testing.assert_close(net.colour(e, z), y, rtol=1e-4, atol=1e-3)
    both = torch.stack([y, y + 1])  # a leading sample dimension
    torch.testing.assert_close(net.whiten(both, z)[0], e)
    torch.testing.assert_close(net.colour(net.whiten(both, z), z), both, rtol=1e-4, atol=1e-3)
    for k in range(3):
        at = z[k : k + 1]
        jacobian = torch.autograd.functional.jacobian(lambda v, at=at: net.whiten(v, at)[0], y[:1])
        exact = torch.linalg.slogdet(jacobian.reshape(2, 2))[1]
        torch.testing.assert_close(net.log_det(at)[0], exact, atol=1e-3, rtol=0)


def test_constant_noise_is_found_to_be_constant():
    z, y = diagonal(90)
    net = HeteroscedasticRegression(10, 10, 2).fit(z, y)
    z, y = diagonal(4000, seed=1)
    sparse = SparseRegression(10, 10, 2).fit(*diagonal(90))
    assert float(net.loss(y, z).mean()) < float(sparse.loss(y, z).mean()) + 0.1


def test_scales_do_not_extrapolate():
    z, y = varying(300)
    net = HeteroscedasticRegression(3, 2, 2).fit(z, y)
    far = net.log_det(30 * torch.randn(1000, 3))
    near = net.log_det(z)
    slack = 2 * float(near.max() - near.min())
    assert float(near.min()) - slack < float(far.min())
    assert float(far.max()) < float(near.max()) + slack


def test_the_scale_of_one_variance_is_that_of_maximum_likelihood():
    squares = torch.rand(50, generator=torch.Generator().manual_seed(0)).double() + 0.1
    found = select_scale(design(50, 4), squares)
    if int((found[1:] != 0).sum()) == 0:
        assert float(found[0].exp()) == pytest.approx(float(squares.mean()), rel=1e-3)
    features = design(2000, 4)
    noise = torch.randn(2000, generator=torch.Generator().manual_seed(1)).double()
    found = select_scale(features, (noise * (0.5 + 0.4 * features[:, 3]).exp()) ** 2)
    # The errors are √(2/N) = 0.03; squares beyond nine variances count as nine.
    torch.testing.assert_close(found[[0, 3]], torch.tensor([1.0, 0.8]).double(), atol=0.1, rtol=0)
    assert float(found[[1, 2, 4]].abs().max()) == 0


def test_outliers_do_not_make_scales_of_their_own():
    """Student's t with two degrees of freedom, whose scale is constant, on twelve features."""
    found = 0
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        normal, chi = (torch.randn(300, k, generator=generator).double() for k in (1, 2))
        residuals = normal[:, 0] / chi.pow(2).mean(dim=1).sqrt()
        found += int((select_scale(design(300, 12, seed), residuals**2)[1:] != 0).sum())
    assert found < 30  # without the bound about a hundred


def test_weights_are_refused():
    with pytest.raises(ValueError, match="weights must be None"):
        HeteroscedasticRegression(3, 2, 2).fit(*varying(50), torch.ones(50))


def test_the_noise_may_be_a_mixture_as_well():
    z, y = varying(400)
    outliers = torch.rand(400, 1, generator=torch.Generator().manual_seed(0)) < 0.1
    y = torch.where(outliers, y + 5 * torch.randn(400, 2), y)
    net = HeteroscedasticRegression(3, 2, 2).fit(z, y)
    both = fit_noise(net, z, y)
    assert isinstance(both, AroundRegression)
    assert both.regression is net
    assert float(both.loss(y, z).mean()) < float(net.loss(y, z).mean()) - 0.1


def test_both_kinds_are_experts():
    z, x = varying(150)
    sparse = RegressionExpert(2, sparse=True)
    varies = RegressionExpert(2, sparse=True, heteroscedastic=True)
    specs = (sparse, varies, replace(varies, mixture=True))
    config = FitConfig(max_epochs=1)
    experts = fit_experts(specs, config, z, x, torch.arange(20, 150), torch.arange(20))
    # The noise is Gaussian, so that the last one would be the second one again.
    assert [expert.spec.name for expert in experts] == [
        "sparse quadratic",
        "heteroscedastic quadratic",
    ]
    assert isinstance(experts[0].net, SparseRegression)
    assert isinstance(experts[1].net, HeteroscedasticRegression)
    with pytest.raises(ValueError, match="exclude each other"):
        RegressionExpert(1, kernel=True, sparse=True)
    with pytest.raises(ValueError, match="pass sparse=True, too"):
        RegressionExpert(2, heteroscedastic=True)


def test_fits_to_folds_are_averaged_where_features_are_chosen():
    z, x = varying(60)
    prior = MultivariateNormal(torch.zeros(3), torch.eye(3))
    experts = (RegressionExpert(1), RegressionExpert(2, sparse=True))
    proxy = LikelihoodProxy(prior, experts, num_folds=3)
    proxy.fit(z, x, torch.arange(50), torch.arange(50, 60))
    bags = {fitted.spec: isinstance(fitted.net, Bag) for fitted in proxy.fitted}
    assert bags == {experts[0]: False, experts[1]: True}


def test_a_polynomial_of_too_many_terms_is_not_fitted():
    z = torch.randn(60, 40)
    specs = (RegressionExpert(1), RegressionExpert(2, sparse=True))  # 861 terms
    config = FitConfig(max_epochs=1)
    experts = fit_experts(specs, config, z, z[:, :2], torch.arange(20, 60), torch.arange(20))
    assert [expert.spec for expert in experts] == [specs[0]]

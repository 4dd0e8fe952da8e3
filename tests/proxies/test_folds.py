"""Cross-fitted experts: unseen pairs, bags, and when they are used."""

import math

import pytest
import torch
from sbi.utils import BoxUniform
from torch.distributions import Normal

from sbi_jeffreys import FlowExpert, JeffreysOptions, NPE_Jeffreys, RegressionExpert
from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.proxies import LikelihoodProxy
from sbi_jeffreys.proxies.cross_fitting import cross_fitted
from sbi_jeffreys.proxies.experts.base import ExpertData, scales_of
from sbi_jeffreys.proxies.folds import Bag, fit_folds

PRIOR = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
QUICK = FitConfig(max_epochs=2)


def pairs(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    z = PRIOR.sample((num,))
    return z, z @ torch.tensor([[1.0, 0.5, 0.0], [0.0, -2.0, 1.0]]) + 0.3 * torch.randn(num, 3)


class Shifted(torch.nn.Module):
    """N(z + shift, 0.01²)."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def log_prob(self, y, z):
        return Normal(z + self.shift, 0.01).log_prob(y).sum(-1)

    def sample(self, shape, z):
        return z + self.shift + 0.01 * torch.randn(*shape, *z.shape)


def test_a_bag_is_the_mixture_in_equal_parts():
    bag, z = Bag([Shifted(0.0), Shifted(0.005)]), torch.zeros(1, 1)
    density = 0.5 * (Normal(0.0, 0.01).log_prob(z).exp() + Normal(0.005, 0.01).log_prob(z).exp())
    torch.testing.assert_close(bag.log_prob(z.unsqueeze(0), z)[0], density.log()[0])


def test_draws_of_a_bag_belong_to_their_conditions_and_come_from_all_fits():
    torch.manual_seed(0)
    z = 10.0 * torch.arange(300.0).unsqueeze(1)
    shifts = Bag([Shifted(0.0), Shifted(1.0), Shifted(2.0)]).sample(torch.Size((2,)), z) - z
    assert shifts.shape == (2, 300, 1)
    nearest = shifts.round()
    assert float((shifts - nearest).abs().max()) < 0.1
    counts = torch.bincount(nearest[0, :, 0].long(), minlength=3)
    assert int(counts.min()) > 100 - 4 * math.sqrt(300 * 2 / 9)  # binomial: four deviations


def test_a_pair_is_judged_by_the_fit_that_has_not_seen_it():
    z, x = pairs(60)
    train = torch.arange(7, 60)
    torch.manual_seed(3)
    (expert,), _ = fit_folds((RegressionExpert(1),), QUICK, z, x, train, 4)
    torch.manual_seed(3)
    folds = train[torch.randperm(53)].tensor_split(4)
    scales = scales_of(x[train])
    expected = []
    for k, unseen in enumerate(folds):
        rest = torch.cat([fold for j, fold in enumerate(folds) if j != k])
        data = ExpertData(z, x, rest, unseen, QUICK, scales)
        expected.append(RegressionExpert(1).fit(data, ()).held_out)
    torch.testing.assert_close(expert.held_out, torch.cat(expected))
    # What is kept is fitted to all of them, once.
    whole = RegressionExpert(1).fit(ExpertData(z, x, train, train, QUICK, scales), ())
    torch.testing.assert_close(expert.net.coefficients, whole.net.coefficients)


def test_nets_of_all_folds_are_kept():
    z, x = pairs(60)
    specs = (RegressionExpert(1), FlowExpert("maf", num_transforms=2))
    experts, _ = fit_folds(specs, QUICK, z, x, torch.arange(60), 3)
    assert [expert.spec for expert in experts] == list(specs)
    bag = experts[1].net
    assert isinstance(bag, Bag)
    y = experts[1].transform(x[:5]).unsqueeze(0)
    apart = torch.stack([net.log_prob(y, z[:5]) for net in bag.nets])
    assert float(apart.std(0).min()) > 1e-3  # three different fits
    torch.testing.assert_close(bag.log_prob(y, z[:5]), apart.exp().mean(0).log())


def test_a_fold_gets_the_proxy_that_has_not_seen_it():
    theta, x = pairs(80)
    specs = (RegressionExpert(1), FlowExpert("maf", num_transforms=2))
    proxy = LikelihoodProxy(PRIOR, specs, QUICK, num_folds=3)
    proxy.fit(theta, x, torch.arange(70), torch.arange(70, 80))
    folds = cross_fitted(proxy, theta, x, torch.arange(70), QUICK)
    assert torch.cat([unseen for unseen, _ in folds]).sort().values.tolist() == list(range(70))
    found = [fit.log_factor(theta[rows].unsqueeze(0), x[rows])[0] for rows, fit in folds]
    parts = torch.stack([expert.held_out for expert in proxy.mixture()])
    expected = torch.logsumexp(parts + proxy.weights.log().unsqueeze(1), dim=0)
    torch.testing.assert_close(torch.cat(found), expected)
    assert len(proxy.mixture()) == len(folds[0][1].mixture())
    assert not proxy.take_folds()  # forgotten


def test_a_proxy_without_folds_is_fitted_again_to_be_judged():
    """Its inexpensive experts, each pair by a fit without it; where these have most weight."""
    theta, x = pairs(400)
    train, val = torch.arange(360), torch.arange(360, 400)
    specs = (RegressionExpert(1), RegressionExpert(1, kernel=True))
    proxy = LikelihoodProxy(PRIOR, specs, QUICK).fit(theta, x, train, val)
    folds = cross_fitted(proxy, theta, x, train, QUICK)
    assert torch.cat([unseen for unseen, _ in folds]).sort().values.tolist() == train.tolist()
    unseen, twin = folds[0]
    assert [e.spec for e in twin.mixture()] == [e.spec for e in proxy.mixture()]
    torch.testing.assert_close(twin.weights, proxy.weights)
    rest = train[~torch.isin(train, unseen)]
    alone = LikelihoodProxy(PRIOR, specs, QUICK, num_folds=1).fit(theta, x, rest, val)
    coefficients = [p.mixture()[0].net.coefficients for p in (twin, alone, proxy)]
    apart = [float((other - coefficients[0]).abs().max()) for other in coefficients[1:]]
    assert apart[0] < 0.2 * apart[1]  # but for the scale of θ
    flow = LikelihoodProxy(PRIOR, (FlowExpert("maf", num_transforms=2),), QUICK)
    assert cross_fitted(flow.fit(theta, x, train, val), theta, x, train, QUICK) == []


def test_held_out_pairs_do_not_touch_a_cross_fitted_proxy():
    """Proxy and main are compared on them: they must neither fit nor choose anything."""
    theta, x = pairs(60)
    train, val = torch.arange(50), torch.arange(50, 60)
    specs = (RegressionExpert(1), FlowExpert("maf", num_transforms=2))
    values = []
    for other in (x[val], x[val].flip(0)):
        changed = torch.cat([x[train], other])
        torch.manual_seed(1)
        proxy = LikelihoodProxy(PRIOR, specs, QUICK, num_folds=3)
        proxy.fit(theta, changed, train, val)
        values.append(proxy.log_factor(theta[:20].unsqueeze(0), x[:20]))
    assert torch.equal(values[0], values[1])


def test_the_exact_model_gets_the_weight():
    theta, x = pairs(100)
    train, val = torch.arange(90), torch.arange(90, 100)
    proxy = LikelihoodProxy(PRIOR, (RegressionExpert(1), FlowExpert("maf")), QUICK)
    proxy.fit(theta, x, train, val)
    assert float(proxy.weights[0]) > 0.95


@pytest.mark.parametrize(
    ("num", "folds"), [(19, 1), (20, 10), (149, 10), (150, 5), (299, 5), (300, 1)]
)
def test_folds_are_for_few_simulations(num, folds):
    assert LikelihoodProxy(PRIOR).folds_for(num) == folds


@pytest.mark.parametrize("folds", [1, 3])
def test_the_option_reaches_the_proxy(folds):
    theta, x = pairs(60)
    options = JeffreysOptions(
        experts=(FlowExpert("maf", num_transforms=2),),
        proxy_fit=QUICK,
        proxy_folds=folds,
        num_steps=1,
        proxy_draws=50,
    )
    inference = NPE_Jeffreys(PRIOR, show_progress_bars=False, options=options)
    inference.append_simulations(theta, x).train(max_num_epochs=2)
    proxy = inference.proxy
    assert isinstance(proxy, LikelihoodProxy)
    assert isinstance(proxy.fitted[0].net, Bag) == (folds > 1)


def test_too_many_folds_are_refused():
    theta, x = pairs(20)
    proxy = LikelihoodProxy(PRIOR, (RegressionExpert(1),), QUICK, num_folds=10)
    with pytest.raises(
        ValueError,
        match=r"num_folds=10 \(proxy_folds of JeffreysOptions\) needs at least 20 .* got 15",
    ):
        proxy.fit(theta, x, torch.arange(15), torch.arange(15, 20))


def test_networks_are_not_fitted_where_a_regression_has_won_on_the_pairs_of_all_folds():
    """Two epochs of a flow have no chance against the exact model."""
    z, x = pairs(300)
    flows = FlowExpert("maf", 0.3, num_transforms=2), FlowExpert("maf", 0.5, num_transforms=2)
    around = FlowExpert("maf", num_transforms=2, around_regression=True)
    specs = (RegressionExpert(1), *flows, around)
    experts, _ = fit_folds(specs, QUICK, z, x, torch.arange(300), 5)
    assert {expert.spec for expert in experts} == {specs[0], flows[0], around}
    assert all(len(expert.held_out) == 300 for expert in experts)

"""Units of parameters and outputs: a few values are counted, tiny ones scaled."""

import math

import pytest
import torch
from sbi.utils import BoxUniform
from torch.distributions import Normal

from sbi_jeffreys import FlowExpert, LikelihoodProxy, RegressionExpert
from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.proxies.experts import NeuralRegressionExpert
from sbi_jeffreys.proxies.units import Units

PRIOR = BoxUniform(-torch.ones(1), torch.ones(1))
TRAIN, VAL = torch.arange(270), torch.arange(270, 300)


@pytest.mark.parametrize(
    ("coding", "counted"),
    [
        ((0.0, 0.5), (0, 1)),
        ((-1.0, 1.0), (0, 1)),
        ((0.1, 0.2, 0.4), (0, 1, 3)),
        ((-300.0, 0.0, 600.0), (0, 1, 3)),
        ((0.0, 1e-8), (0, 1)),
    ],
)
def test_a_few_equally_spaced_values_are_counted(coding, counted):
    values = torch.tensor(coding).repeat(20).unsqueeze(1)
    units = Units.fit(values)
    assert units.lattice.tolist() == [True]
    assert units(values)[: len(counted), 0].tolist() == list(counted)
    torch.testing.assert_close(units.inverse(units(values)), values)
    assert float(units.log_det) == 0.0  # of a probability


def test_other_values_stay_as_they_are():
    torch.manual_seed(0)
    columns = [
        torch.randn(100),
        torch.randint(0, 2, (100,)).float(),
        torch.randint(3, 40, (100,)).float(),
        torch.tensor([0.0, 0.1, 0.1717]).repeat(34)[:100],  # on no lattice
        torch.arange(100) * 0.25,  # on one of too many values
        1.0 + 6e-8 * torch.randint(0, 2, (100,)),  # constant but for rounding
    ]
    values = torch.stack(columns, dim=1)
    units = Units.fit(values)
    assert torch.equal(units(values), values)
    assert not bool(units.lattice.any())
    assert torch.equal(Units.fit(values[:8])(values), values)  # few values by chance


def test_tiny_values_are_scaled_and_the_density_knows_it():
    torch.manual_seed(0)
    values = torch.randn(500, 2) * torch.tensor([1e-9, 1.0])
    units = Units.fit(values)
    assert float(units(values).std(0)[0]) == pytest.approx(1.0, abs=1e-3)
    assert torch.equal(units(values)[:, 1], values[:, 1])
    assert float(units.log_det) == pytest.approx(-float(values[:, 0].std().log()), abs=1e-4)


@pytest.mark.parametrize("unit", [1e-10, 1.0])
def test_networks_see_parameters_and_outputs_of_any_unit(unit):
    """x = θ + 0.2 ε: the exact loss of x is −0.19, and 0.82 for a flow that does not see θ."""
    torch.manual_seed(0)
    theta = PRIOR.sample((300,))
    x = (theta + 0.2 * torch.randn(300, 1)) * unit
    prior = BoxUniform(-unit * torch.ones(1), unit * torch.ones(1))
    proxy = LikelihoodProxy(prior, (FlowExpert("maf"),), FitConfig(max_epochs=40), num_folds=1)
    proxy.fit(theta * unit, x, TRAIN, VAL)
    fresh = PRIOR.sample((1_000,))
    y = fresh + 0.2 * torch.randn(1_000, 1)
    loss = -float(proxy.log_factor(fresh.unsqueeze(0) * unit, y * unit).mean()) - math.log(unit)
    exact = -float(Normal(fresh, 0.2).log_prob(y).mean())
    assert exact - 0.02 < loss < exact + 0.15
    _, drawn = proxy.sample_joint(1_000)
    assert float(drawn.std() / unit) == pytest.approx(float(y.std()), rel=0.15)


@pytest.mark.parametrize("coding", [(0.0, 1.0), (0.0, 0.5), (-1.0, 1.0)])
def test_a_binary_output_in_any_coding_has_probabilities_and_all_its_draws_are_kept(coding):
    """At most θ the output is certain: a latent far beyond the last value is that value."""
    torch.manual_seed(0)
    low, high = coding
    theta = PRIOR.sample((300,))
    on = theta + 0.1 * torch.randn(300, 1) > 0
    experts = (NeuralRegressionExpert(), RegressionExpert(1))
    proxy = LikelihoodProxy(PRIOR, experts, FitConfig(max_epochs=60), num_folds=1)
    proxy.fit(theta, torch.where(on, high, low), TRAIN, VAL)
    grid = torch.linspace(-0.95, 0.95, 20).reshape(-1, 1, 1)
    log_p = proxy.log_factor(grid, torch.tensor([[high]]))[:, 0]
    log_not = proxy.log_factor(grid, torch.tensor([[low]]))[:, 0]
    assert float((log_p.exp() + log_not.exp() - 1).abs().max()) < 0.01
    exact = Normal(0.0, 0.1).cdf(grid[:, 0, 0])
    assert float((log_p.exp() - exact).abs().mean()) < 0.05
    drawn, x = proxy.sample_joint(4_000)
    assert sorted(x.unique().tolist()) == [low, high]
    shares = torch.histc(drawn, 4, -1.0, 1.0) / 4_000  # the prior: a quarter each
    assert float((shares - 0.25).abs().max()) < 5 * math.sqrt(0.25 * 0.75 / 4_000)

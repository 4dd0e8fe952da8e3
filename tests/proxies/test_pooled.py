"""The log-linear pool of an energy and a likelihood of summaries, against closed forms."""

from dataclasses import replace

import pytest
import torch
from contract_tools import TINY
from sbi.utils import BoxUniform
from torch import Tensor, nn
from torch.distributions import Normal

from sbi_jeffreys import FlowExpert, MainBuilder, NPE_Jeffreys, RegressionExpert
from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.proxies import EnergyConfig, PooledProxy
from sbi_jeffreys.proxies.stacking import pooling_powers

PRIOR = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))


def two_factors(num: int) -> tuple[Tensor, Tensor]:
    """log N(x₁; θ, 1), and half of log N(x₂; θ, 0.5²), at true θ ~ N(0, 1) and 100 contrasts."""
    torch.manual_seed(0)
    theta = torch.randn(num)
    x_1, x_2 = theta + torch.randn(num), theta + 0.5 * torch.randn(num)
    every = torch.cat([theta.unsqueeze(0), torch.randn(100, num)])
    factors = torch.stack(
        [Normal(every, 1.0).log_prob(x_1), 0.5 * Normal(every, 0.5).log_prob(x_2)]
    )
    return factors, torch.zeros_like(every)


def test_powers_are_those_of_the_posterior():
    """The exact log-likelihood is the first factor and twice the second."""
    powers = pooling_powers(*two_factors(8_000))
    assert powers.tolist() == pytest.approx([1.0, 2.0], abs=0.15)


def test_powers_of_a_few_pairs_stay_near_a_half():
    assert pooling_powers(*two_factors(4)).tolist() == pytest.approx([0.5, 0.5], abs=0.25)
    factors, offset = two_factors(10)
    assert pooling_powers(torch.full_like(factors, torch.nan), offset).tolist() == [0.5, 0.5]


def test_powers_leave_out_pairs_that_are_not_finite_and_contrasts_outside_the_prior():
    factors, offset = two_factors(3_000)
    expected = pooling_powers(factors[..., 10:], offset[:, 10:])
    factors[0, 0, :10] = torch.nan
    torch.testing.assert_close(pooling_powers(factors, offset), expected)
    more = torch.cat([offset, torch.full_like(offset[:1], -torch.inf)])
    wild = torch.cat([factors, torch.full_like(factors[:, :1], 1e9)], dim=1)
    torch.testing.assert_close(pooling_powers(wild, more), expected)


def test_a_factor_that_contradicts_the_data_gets_power_zero():
    factors, offset = two_factors(2_000)
    against = factors[0] - 2 * factors[1]  # both together: the data favour a negative power of it
    powers = pooling_powers(torch.stack([factors[0], against]), offset)
    assert float(powers[1]) == 0.0
    torch.testing.assert_close(powers[:1], pooling_powers(factors[:1], offset))


class Mean(nn.Module):
    """The mean of twenty trials, times one (trainable)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.mean(dim=1)


@pytest.mark.slow
def test_training_pools_both_and_reports_their_powers():
    """Twenty trials of N(θ, 1): the likelihood of their mean is exact, the energy hardly fitted."""
    torch.manual_seed(0)
    theta = PRIOR.sample((400,))
    x = theta.unsqueeze(1) + torch.randn(400, 20, 2)
    options = replace(
        TINY,
        experts=(RegressionExpert(1),),
        energy=EnergyConfig(num_nets=1, fit=FitConfig(max_epochs=2)),
    )
    builder = MainBuilder("maf", embedding_net=Mean())
    inference = NPE_Jeffreys(PRIOR, builder, options=options, show_progress_bars=False)
    inference.append_simulations(theta, x).train(max_num_epochs=5)
    proxy = inference.proxy
    assert isinstance(proxy, PooledProxy)
    likelihood = proxy.likelihood
    assert likelihood is not None
    assert float(proxy.powers[0]) > 0.6
    assert dict(inference.training_report.experts).keys() == {"energy", "likelihood of summaries"}
    # v log ℓ + w f, with the energy's part by itself:
    proxy.likelihood = None
    energy = proxy.log_factor(theta[None, :50], x[:50])
    proxy.likelihood = likelihood
    expected = energy + proxy.powers[0] * likelihood.log_factor(theta[None, :50], x[:50])
    torch.testing.assert_close(proxy.log_factor(theta[None, :50], x[:50]), expected)
    exact = Normal(theta[None, :50], 20**-0.5).log_prob(x[:50].mean(dim=1)).sum(dim=-1)
    missed = exact - likelihood.log_factor(theta[None, :50], x[:50])
    assert float(missed.std()) < 0.3


def test_summaries_without_a_density_leave_the_energy_alone():
    class Dead(Mean):
        def forward(self, x: Tensor) -> Tensor:
            return 0.0 * super().forward(x)

    torch.manual_seed(0)
    theta = PRIOR.sample((100,))
    x = theta.unsqueeze(1) + torch.randn(100, 20, 2)
    options = replace(TINY, experts=(FlowExpert("maf"),))
    builder = MainBuilder("maf", embedding_net=Dead())
    inference = NPE_Jeffreys(PRIOR, builder, options=options, show_progress_bars=False)
    inference.append_simulations(theta, x).train(max_num_epochs=2)
    proxy = inference.proxy
    assert isinstance(proxy, PooledProxy)
    assert proxy.likelihood is None
    assert proxy.powers.tolist() == [0.0, 1.0]
    assert "without a likelihood of summaries" in inference.training_report.proxy


@pytest.mark.parametrize(("asked", "judged_by"), [(None, 10), (3, 90)])
def test_the_likelihood_of_summaries_has_as_many_folds_as_asked_for(asked, judged_by):
    """A single fit is judged by the ten held-out pairs, folds by all 90 training pairs."""
    torch.manual_seed(0)
    theta = PRIOR.sample((100,))
    x = theta.unsqueeze(1) + torch.randn(100, 20, 2)
    energy = EnergyConfig(num_nets=1, num_contrasts=4, fit=FitConfig(max_epochs=1))
    options = replace(TINY, experts=(RegressionExpert(1),), energy=energy, proxy_folds=asked)
    builder = MainBuilder("maf", embedding_net=Mean())
    inference = NPE_Jeffreys(PRIOR, builder, options=options, show_progress_bars=False)
    inference.append_simulations(theta, x).train(max_num_epochs=2)
    proxy = inference.proxy
    assert isinstance(proxy, PooledProxy)
    assert proxy.likelihood is not None
    assert proxy.likelihood.fitted[0].held_out.shape == (judged_by,)
    proxy.num_folds = 60
    proxy.set_proposal(inference._neural_net)
    with pytest.raises(ValueError, match=r"num_folds=60 .* at least 120 training simulations"):
        proxy.fit(theta, x, torch.arange(90), torch.arange(90, 100), max_epochs=1)

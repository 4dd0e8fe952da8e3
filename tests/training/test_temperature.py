"""The proxy's temperature: found where it is off, left alone where it is not, and felt by the main.

p(θ) = N(0, I), p(x|θ) = N(θ, 0.5² I). A proxy whose noise has another scale s is the exact one at
the inverse temperature 0.5²/s².
"""

import math
from dataclasses import replace

import pytest
import torch
from contract_tools import TINY
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from sbi_jeffreys import GivenProxy, NPE_Jeffreys
from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.proxies import EnergyProxy, LikelihoodProxy
from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.training.data import Simulations
from sbi_jeffreys.training.held_out import HeldOut
from sbi_jeffreys.training.pool import draw_pool, tempering_weights
from sbi_jeffreys.training.temperature import Evidence, inverse_temperature
from sbi_jeffreys.training.tempering import evidence_of, temper

NOISE, DIM = 0.5, 2
PRIOR = MultivariateNormal(torch.zeros(DIM), torch.eye(DIM))


class ScaledProxy(Proxy):
    """Likelihood N(θ, s²)."""

    can_sample = True
    can_be_tempered = True

    def __init__(self, scale: float) -> None:
        super().__init__(PRIOR)
        self.scale = scale

    def log_factor(self, theta: Tensor, x: Tensor) -> Tensor:
        return Normal(theta, self.scale).log_prob(x).sum(-1)

    def sample_joint(self, num_samples: int) -> tuple[Tensor, Tensor]:
        return self.sample_given(PRIOR.sample((num_samples,)))

    def sample_given(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        return theta, theta + self.scale * torch.randn_like(theta)


class WideMain(ConditionalDensityEstimator):
    """N(x / 2, 1): covers the posterior, no more."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), torch.Size((DIM,)), torch.Size((DIM,)))

    @property
    def embedding_net(self) -> None:
        return None

    def log_prob(self, input: Tensor, condition: Tensor, **kwargs) -> Tensor:
        return Normal(0.5 * condition, 1.0).log_prob(input).sum(-1)

    def sample(self, sample_shape: torch.Size, condition: Tensor, **kwargs) -> Tensor:
        return 0.5 * condition + torch.randn(*sample_shape, *condition.shape)

    def loss(self, input: Tensor, condition: Tensor, **kwargs) -> Tensor:
        return -self.log_prob(input.unsqueeze(0), condition)[0]


def pairs(num: int) -> tuple[Tensor, Tensor]:
    theta = PRIOR.sample((num,))
    return theta, theta + NOISE * torch.randn_like(theta)


def held_out(num: int, atomic: bool = False) -> HeldOut:
    return HeldOut(*pairs(num), torch.ones(num), atomic)


# 1,000 pairs of two coordinates carry about 600 units of information on log γ: a standard deviation
# of 0.04, one of which is taken off. The prior's 44 units shrink log γ by 7 %.
DEVIATION = 0.04


@pytest.mark.parametrize("atomic", [False, True], ids=["first round", "atomic"])
@pytest.mark.parametrize("scale", [0.5, 0.6, 0.7])
def test_the_true_temperature_is_found(scale: float, atomic: bool):
    torch.manual_seed(1)
    found = held_out(1000, atomic).inverse_temperature(ScaledProxy(scale), WideMain())
    expected = max(0.0, 0.93 * 2 * math.log(scale / NOISE) - DEVIATION)
    assert math.log(found) == pytest.approx(expected, abs=4 * DEVIATION)


def test_few_contrasts_do_not_bias_it():
    """A normaliser estimated from five draws would be too low, the more the sharper."""
    torch.manual_seed(1)
    theta, x = pairs(2000)
    both = torch.cat([theta.unsqueeze(0), PRIOR.sample((5, 2000))])  # m = p: no offset
    factor = ScaledProxy(NOISE).log_factor(both, x)
    assert inverse_temperature(torch.zeros_like(factor), factor) < 1.1


@pytest.mark.parametrize("scale", [0.45, 0.6])
def test_pairs_unseen_by_the_fits_of_a_mixture_are_evidence_in_both_directions(scale: float):
    """4,000 pairs: a standard deviation of 0.02, none of which is taken off."""
    torch.manual_seed(1)
    theta, x = pairs(4_000)
    folds = [(torch.arange(k, 4_000, 2), ScaledProxy(scale)) for k in range(2)]
    simulations = Simulations(theta, x, torch.arange(4_000), torch.arange(0), 0)
    evidence = evidence_of(folds, WideMain(), simulations, lambda x: torch.ones(len(x)))  # type: ignore[arg-type]
    assert evidence is not None
    assert evidence.log_factor.shape[1] == 4_000
    nothing = torch.full((3, 5), math.nan)
    found = inverse_temperature(torch.zeros(3, 5), nothing, None, evidence)
    assert math.log(found) == pytest.approx(0.98 * 2 * math.log(scale / NOISE), abs=0.06)


def test_pairs_of_folds_that_the_kernel_excludes_are_no_evidence():
    theta, x = pairs(50)
    folds = [(torch.arange(50), ScaledProxy(0.6))]
    simulations = Simulations(theta, x, torch.arange(50), torch.arange(0), 0)
    assert evidence_of(folds, WideMain(), simulations, lambda x: torch.zeros(len(x))) is None  # type: ignore[arg-type]
    half = (torch.arange(50) < 25).float()
    evidence = evidence_of(folds, WideMain(), simulations, lambda x: half)  # type: ignore[arg-type]
    assert isinstance(evidence, Evidence)
    assert evidence.weights.tolist() == half.tolist()  # worth 25 pairs
    assert evidence_of([], WideMain(), simulations, lambda x: half) is None  # type: ignore[arg-type]


def test_a_training_with_folds_uses_the_pairs_of_all_folds(monkeypatch):
    seen = []
    monkeypatch.setattr(HeldOut, "inverse_temperature", lambda *given: seen.append(given[4]) or 1.2)
    options = replace(TINY, proxy="auto", proxy_folds=3, temper=True, num_steps=5, proxy_draws=100)
    inference = NPE_Jeffreys(PRIOR, "maf", show_progress_bars=False, options=options)
    inference.append_simulations(*pairs(60)).train(max_num_epochs=2)
    assert seen[0].log_factor.shape[1] == 54
    assert isinstance(inference.proxy, LikelihoodProxy)
    assert inference.proxy.take_cross_fitted() == []  # forgotten


@pytest.mark.parametrize(("found", "used"), [(1.04, 1.0), (0.96, 1.0), (1.06, 1.06), (0.9, 0.9)])
def test_a_mixture_is_tempered_where_it_is_worth_weighting_a_pool(monkeypatch, found, used):
    monkeypatch.setattr(HeldOut, "inverse_temperature", lambda *_: found)
    for evidence, expected in (
        (Evidence(*[torch.zeros(2, 3)] * 2, torch.ones(3)), used),
        (None, found),
    ):
        proxy = ScaledProxy(0.6)
        temper(proxy, WideMain(), held_out(5), None, evidence)  # type: ignore[arg-type]
        assert float(proxy.inverse_temperature) == pytest.approx(expected)


def test_what_is_clearly_too_sharp_is_widened():
    """ℓ^(0.5/0.4)² in place of ℓ: the truth is γ = 0.64."""
    torch.manual_seed(1)
    found = held_out(1000).inverse_temperature(ScaledProxy(0.4), WideMain())
    assert found == pytest.approx(0.64, abs=0.08)


def test_what_is_a_little_too_sharp_stays_so():
    torch.manual_seed(1)
    found = [held_out(50).inverse_temperature(ScaledProxy(0.49), WideMain()) for _ in range(20)]
    assert sum(value < 1 for value in found) <= 3  # two standard deviations: one in forty


def test_it_is_read_at_whatever_temperature_the_proxy_has():
    values = []
    for gamma in (1.0, 0.5):
        torch.manual_seed(1)
        proxy = ScaledProxy(0.65)
        proxy.inverse_temperature.fill_(gamma)
        values.append(held_out(200).inverse_temperature(proxy, WideMain()))
    # The draws follow the proxy at its temperature, so the values agree but for chance.
    assert values[0] == pytest.approx(values[1], rel=0.03)
    assert values[0] > 1.1


def test_a_handful_of_pairs_does_not_move_it():
    """Five pairs carry 3 units of information against the prior's 44: not a deviation's worth."""
    torch.manual_seed(1)
    found = [held_out(5).inverse_temperature(ScaledProxy(0.65), WideMain()) for _ in range(20)]
    assert found == [1.0] * 20


@pytest.mark.full_reading
def test_an_exact_proxy_is_seldom_sharpened():
    """A hundred pairs, as at 1,000 simulations: by a tenth in no case of twenty."""
    torch.manual_seed(1)
    found = [held_out(100).inverse_temperature(ScaledProxy(NOISE), WideMain()) for _ in range(20)]
    assert max(found) < 1.1
    assert found.count(1.0) >= 12  # 84 % expected


def test_pairs_count_by_weight():
    both = torch.randn(11, 400, generator=torch.Generator().manual_seed(0))
    factor = -0.5 * both**2  # for the first half the truth is the densest, else the rarest
    factor[0, :200], factor[0, 200:] = 0.0, -4.0
    first = torch.cat([torch.ones(200), torch.zeros(200)])
    zeros = torch.zeros_like(factor)
    assert inverse_temperature(zeros, factor, first) > 1.3
    assert inverse_temperature(zeros, factor, 1 - first) < 0.7


def test_contrasts_outside_the_prior_do_not_count_and_unreadable_pairs_are_left_out():
    torch.manual_seed(0)
    factor = torch.randn(9, 300)
    offset = torch.zeros(9, 300)
    clean = inverse_temperature(offset, factor)
    padded_factor = torch.cat([factor, torch.full((4, 300), math.nan)])
    padded_offset = torch.cat([offset, torch.full((4, 300), -math.inf)])
    assert inverse_temperature(padded_offset, padded_factor) == clean
    broken = torch.cat([factor, torch.full((9, 1), math.nan)], dim=1)
    assert inverse_temperature(torch.zeros(9, 301), broken) == clean
    assert inverse_temperature(offset, torch.full_like(factor, math.nan)) == 1.0


def test_the_atomic_reading_is_tempered():
    torch.manual_seed(0)
    pairs_ = held_out(100, atomic=True)
    proxy = ScaledProxy(0.7)
    proxy.inverse_temperature.fill_((0.7 / NOISE) ** 2)  # the exact one, up to a constant
    exact, found = (
        pairs_.mean(pairs_.proxy_losses(each, WideMain())[0])  # type: ignore[arg-type]
        for each in (ScaledProxy(NOISE), proxy)
    )
    assert found == pytest.approx(exact, abs=1e-4)


def test_the_potential_is_tempered_and_the_prior_is_not():
    proxy, (theta, x) = ScaledProxy(0.65), pairs(7)
    plain = proxy.log_potential(theta.unsqueeze(0), x)
    proxy.inverse_temperature.fill_(1.5)
    expected = PRIOR.log_prob(theta) + 1.5 * (plain[0] - PRIOR.log_prob(theta))
    torch.testing.assert_close(proxy.log_potential(theta.unsqueeze(0), x)[0], expected)
    assert "inverse_temperature" in proxy.state_dict()


@pytest.mark.parametrize("round_", [0, 1])
@pytest.mark.parametrize("gamma", [1.0, 1.3, 1.6])
def test_pairs_of_the_pool_follow_the_tempered_proxy(gamma: float, round_: int):
    """Given x, θ ∼ N(λx, τ²) with precision 1/τ² = 1 + γ/s² and λ = τ² γ/s²."""
    torch.manual_seed(0)
    num, scale = 40_000, 0.65
    proxy = ScaledProxy(scale)
    proxy.inverse_temperature.fill_(gamma)
    theta, x = draw_pool(proxy, pairs(num)[0], first_round=round_ == 0, num_draws=num)
    weights = tempering_weights(proxy, theta, x)
    assert float(weights.mean()) == pytest.approx(1.0, abs=1e-4)
    rows = torch.multinomial(weights, num, replacement=True)
    theta, x = theta[rows], x[rows]
    variance = 1 / (1 + gamma / scale**2)
    slope = variance * gamma / scale**2
    found = float((theta * x).sum() / (x * x).sum())
    # Resampling leaves at least a third of the draws effective: standard deviation 0.005 and 1.2 %.
    assert found == pytest.approx(slope, abs=0.02)
    assert float((theta - slope * x).var()) == pytest.approx(variance, rel=0.05)


def test_a_temperature_that_no_pool_can_be_weighted_by_is_not_used(monkeypatch):
    """γ = 0.1 of a likelihood as sharp as this leaves 1 % of the pool effective."""
    proxy = ScaledProxy(0.02)
    monkeypatch.setattr(HeldOut, "inverse_temperature", lambda *_: 0.1)
    torch.manual_seed(0)
    temper(proxy, WideMain(), held_out(50), None)  # type: ignore[arg-type]
    theta, x = proxy.sample_joint(4_000)
    weights = tempering_weights(proxy, theta, x)
    assert 0.1 < float(proxy.inverse_temperature) < 1
    assert float(weights.sum() ** 2 / (weights**2).sum()) > 0.4 * len(x)


def trained(proxy: Proxy, num: int = 1200, **changes) -> NPE_Jeffreys:
    torch.manual_seed(3)
    options = replace(
        TINY,
        proxy=proxy,
        num_steps=num // 6,
        steps_per_epoch=20,
        proxy_draws=20_000,
        proxy_batch_size=200,
        **changes,
    )
    inference = NPE_Jeffreys(PRIOR, "maf", show_progress_bars=False, options=options)
    inference.append_simulations(*pairs(num)).train(validation_fraction=0.5, max_num_epochs=15)
    return inference


@pytest.fixture(scope="module")
def tempered() -> NPE_Jeffreys:
    return trained(ScaledProxy(0.7))


def width(inference: NPE_Jeffreys) -> float:
    """Mean posterior standard deviation over observations."""
    torch.manual_seed(0)
    x = pairs(200)[1]
    with torch.no_grad():
        draws = inference._neural_net.sample(torch.Size((500,)), x)
    return float(draws.std(0).mean())


def test_the_main_follows_the_tempered_proxy(tempered: NPE_Jeffreys):
    """The truth has width 0.447, the proxy as given 0.573: a third of the excess may stay."""
    assert tempered.proxy is not None
    assert 1.4 < float(tempered.proxy.inverse_temperature) < 2.1
    assert width(tempered) < 0.49
    assert tempered.training_report.inverse_temperature > 1
    assert "tempered with γ" in str(tempered.training_report)


@pytest.mark.slow
def test_without_temperature_the_main_is_as_wide_as_the_proxy():
    inference = trained(ScaledProxy(0.7), temper=False)
    assert width(inference) > 0.53
    assert inference.training_report.inverse_temperature == 1


@pytest.mark.parametrize("changes", [{"temper": False}, {"adaptive": False}])
def test_temperature_can_be_switched_off(changes: dict[str, bool]):
    inference = trained(ScaledProxy(0.7), num=120, **changes)
    assert inference.proxy is not None
    assert float(inference.proxy.inverse_temperature) == 1.0


def test_a_given_likelihood_is_taken_at_its_word():
    inference = trained(GivenProxy(PRIOR, ScaledGiven()), num=120)
    assert inference.proxy is not None
    assert float(inference.proxy.inverse_temperature) == 1.0


def test_an_energy_is_not_tempered():
    """It is fitted by the same ranking losses, its scale included."""
    assert not EnergyProxy.can_be_tempered
    assert LikelihoodProxy.can_be_tempered


class ScaledGiven:
    """The proxy above as a function that is handed over."""

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        return Normal(theta, 0.7).log_prob(x).sum(-1)

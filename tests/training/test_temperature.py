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

from sbi_jeffreys import GivenProxy, NPE_Jeffreys, RegressionExpert
from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.proxies import EnergyProxy, LikelihoodProxy
from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.training import tempering
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


def temperature(offset: Tensor, log_factor: Tensor, weights: Tensor | None = None) -> float:
    """γ by held-out pairs."""
    weights = torch.ones_like(log_factor[0]) if weights is None else weights
    return inverse_temperature([Evidence(offset, log_factor, weights)], optimistic=True)


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
    assert temperature(torch.zeros_like(factor), factor) < 1.1


def evidence_from(num: int, scale: float, kernel=lambda x: torch.ones(len(x))) -> list[Evidence]:
    """Of two folds."""
    theta, x = pairs(num)
    folds = [(torch.arange(k, num, 2), ScaledProxy(scale)) for k in range(2)]
    simulations = Simulations(theta, x, torch.arange(num), torch.arange(0), 0, torch.zeros(num))
    return evidence_of(folds, WideMain(), simulations, kernel)  # type: ignore[arg-type]


@pytest.mark.full_reading
@pytest.mark.parametrize("scale", [0.45, 0.6])
def test_pairs_unseen_by_the_fits_of_a_mixture_are_evidence_in_both_directions(scale: float):
    """20 times 200 pairs: a standard deviation of 0.02, none of which is taken off."""
    torch.manual_seed(1)
    evidence = [part for _ in range(20) for part in evidence_from(400, scale)]
    assert {part.log_factor.shape[1] for part in evidence} == {100}  # half of 200
    found = inverse_temperature(evidence)
    assert math.log(found) == pytest.approx(0.98 * 2 * math.log(scale / NOISE), abs=0.06)


@pytest.mark.full_reading
def test_pairs_of_folds_that_the_kernel_excludes_are_no_evidence():
    assert evidence_from(50, 0.6, lambda x: torch.zeros(len(x))) == []
    half = (torch.arange(25) < 12).float()
    evidence = evidence_from(50, 0.6, lambda x: half)
    assert [part.weights.tolist() for part in evidence] == 2 * [half.tolist()]  # worth 12 pairs
    simulations = Simulations(*pairs(50), torch.arange(50), torch.arange(0), 0, torch.zeros(50))
    assert evidence_of([], WideMain(), simulations, lambda x: half) == []  # type: ignore[arg-type]


class RidgeProxy(ScaledProxy):
    """A likelihood that is too sharp near its ridge |θ| = |x| = 1, and too flat far from it."""

    def log_factor(self, theta: Tensor, x: Tensor) -> Tensor:
        distance = ((theta.norm(dim=-1) - x.norm(dim=-1)) / 0.01).abs()
        return torch.where(distance < 5, -0.5 * distance**2, -12.5 - 0.002 * (distance - 5))


@pytest.mark.full_reading
def test_contrasts_are_taken_from_the_prior_where_adapted_ones_all_miss_the_posterior():
    """A ring is nothing that a few adapted kernels follow; of 2,000 prior draws some are on it."""
    torch.manual_seed(1)
    theta, x = pairs(40)
    simulations = Simulations(theta, x, torch.arange(40), torch.arange(0), 0, torch.zeros(40))

    def contrasts_of(proxy: Proxy) -> Evidence:
        folds = [(torch.arange(40), proxy)]
        (found,) = evidence_of(folds, WideMain(), simulations, lambda x: torch.ones(len(x)))  # type: ignore[arg-type]
        return found

    of_prior, adapted = contrasts_of(RidgeProxy(0.5)), contrasts_of(ScaledProxy(0.5))
    assert len(of_prior.offset) == 2_001
    assert not of_prior.offset.any()
    assert len(adapted.offset) == 65


def test_a_single_pair_far_out_does_not_set_the_temperature():
    torch.manual_seed(1)
    theta, x = pairs(200)
    x[0] += 20.0  # 800 nats less than any other
    both = torch.cat([theta.unsqueeze(0), PRIOR.sample((200, 200))])
    factor = ScaledProxy(NOISE).log_factor(both, x)
    found = inverse_temperature([Evidence(torch.zeros_like(factor), factor, torch.ones(200))])
    assert found == pytest.approx(1.0, abs=0.15)  # three deviations


def trained_with(monkeypatch, num: int, **changes) -> tuple[NPE_Jeffreys, list]:
    """A short training, and what was known when its temperature was set."""
    seen = []
    monkeypatch.setattr(tempering, "temper", lambda *given: seen.append(given))
    options = replace(TINY, proxy="auto", temper=True, num_steps=5, proxy_draws=100, **changes)
    inference = NPE_Jeffreys(PRIOR, "maf", show_progress_bars=False, options=options)
    inference.append_simulations(*pairs(num)).train(max_num_epochs=2)
    return inference, seen[0]


@pytest.mark.full_reading
def test_a_training_with_folds_uses_the_pairs_of_all_folds(monkeypatch):
    inference, (*_, evidence, made_to_judge) = trained_with(monkeypatch, 60, proxy_folds=3)
    assert [part.log_factor.shape[1] for part in evidence] == 3 * [18]
    assert not made_to_judge
    assert isinstance(inference.proxy, LikelihoodProxy)
    assert inference.proxy.take_folds() == []  # forgotten


@pytest.mark.full_reading
def test_a_training_without_folds_has_some_to_judge_its_proxy(monkeypatch):
    changes = {"proxy_folds": 1, "experts": (RegressionExpert(1),)}
    inference, (proxy, *_, evidence, made_to_judge) = trained_with(monkeypatch, 400, **changes)
    assert [part.log_factor.shape[1] for part in evidence] == 5 * [40]
    assert made_to_judge
    assert proxy is inference.proxy


@pytest.mark.full_reading
@pytest.mark.parametrize(
    ("scale", "judged", "expected"),
    [(0.45, False, 0.82), (0.6, False, 1.42), (0.45, True, 0.82), (0.6, True, 1.1)],
)
def test_fits_made_to_judge_widen_only(monkeypatch, scale: float, judged: bool, expected: float):
    monkeypatch.setattr(HeldOut, "inverse_temperature", lambda *_: 1.1)
    torch.manual_seed(1)
    evidence = [part for _ in range(10) for part in evidence_from(400, scale)]
    proxy = ScaledProxy(scale)
    temper(proxy, WideMain(), held_out(5), None, evidence, judged)  # type: ignore[arg-type]
    assert float(proxy.inverse_temperature) == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize(("found", "used"), [(1.04, 1.0), (0.96, 1.0), (1.06, 1.06), (0.9, 0.9)])
def test_a_mixture_is_tempered_where_it_is_worth_weighting_a_pool(monkeypatch, found, used):
    monkeypatch.setattr(tempering, "inverse_temperature", lambda *_: found)
    monkeypatch.setattr(HeldOut, "inverse_temperature", lambda *_: found)
    some = [Evidence(*[torch.zeros(2, 3)] * 2, torch.ones(3))]
    for evidence, expected in ((some, used), ([], found)):
        proxy = ScaledProxy(0.6)
        temper(proxy, WideMain(), held_out(5), None, evidence)  # type: ignore[arg-type]
        assert float(proxy.inverse_temperature) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("folds", "judged", "expected"),
    [(1, False, 1.0), (1, True, 0.84**0.25), (0, False, 0.84**0.25)],
)
def test_what_a_pool_leaves_of_a_mixture_s_temperature_counts_where_it_is_worth_it(
    monkeypatch, folds, judged, expected
):
    """γ = 0.84, then 0.917 and 0.957, at which enough pairs of the pool are effective."""
    monkeypatch.setattr(tempering, "inverse_temperature", lambda *_: 0.84)
    monkeypatch.setattr(HeldOut, "inverse_temperature", lambda *_: 0.84)
    monkeypatch.setattr(tempering, "_share_left", lambda _, gamma: float(gamma > 0.95))
    some = [Evidence(*[torch.zeros(2, 3)] * 2, torch.ones(3))] * folds
    proxy = ScaledProxy(0.6)
    temper(proxy, WideMain(), held_out(5), None, some, judged)  # type: ignore[arg-type]
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
    assert temperature(zeros, factor, first) > 1.3
    assert temperature(zeros, factor, 1 - first) < 0.7


def test_contrasts_outside_the_prior_do_not_count_and_unreadable_pairs_are_left_out():
    torch.manual_seed(0)
    factor = torch.randn(9, 300)
    offset = torch.zeros(9, 300)
    clean = temperature(offset, factor)
    padded_factor = torch.cat([factor, torch.full((4, 300), math.nan)])
    padded_offset = torch.cat([offset, torch.full((4, 300), -math.inf)])
    assert temperature(padded_offset, padded_factor) == clean
    broken = torch.cat([factor, torch.full((9, 1), math.nan)], dim=1)
    assert temperature(torch.zeros(9, 301), broken) == clean
    assert temperature(offset, torch.full_like(factor, math.nan)) == 1.0


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

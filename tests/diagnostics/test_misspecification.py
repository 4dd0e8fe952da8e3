"""The test for misspecification against a simulator whose evidence has a closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sbi.inference import NPE
from torch import Tensor
from torch.distributions import MultivariateNormal

import sbi_jeffreys.diagnostics.misspecification as misspecification
from sbi_jeffreys import (
    EnergyProxy,
    GivenProxy,
    JeffreysOptions,
    NPE_Jeffreys,
    RegressionExpert,
    _sbi,
    misspecification_test,
)
from sbi_jeffreys.diagnostics.misspecification import _beyond_a_limit

PRIOR = MultivariateNormal(torch.zeros(2), torch.eye(2))
EXPERTS = (RegressionExpert(1),)
NOISE = torch.tensor([0.1, 2.0])  # the first output is informative, the second hardly
EVIDENCE = MultivariateNormal(torch.zeros(2), torch.diag(1 + NOISE**2))


def log_likelihood(theta: Tensor, x: Tensor) -> Tensor:
    return torch.distributions.Normal(theta, NOISE).log_prob(x).sum(-1)


def simulate(num: int) -> tuple[Tensor, Tensor]:
    theta = PRIOR.sample((num,))
    return theta, theta + NOISE * torch.randn_like(theta)


def trained(proxy: object = "auto", num: int = 400, num_steps: int = 40) -> NPE_Jeffreys:
    changes: dict[str, Any] = {"proxy": proxy, "num_steps": num_steps, "experts": EXPERTS}
    options = JeffreysOptions(**changes)
    inference = NPE_Jeffreys(PRIOR, options=options, show_progress_bars=False)
    torch.manual_seed(0)
    inference.append_simulations(*simulate(num)).train(max_num_epochs=20)
    return inference


@pytest.fixture(scope="module")
def exact() -> NPE_Jeffreys:
    given = GivenProxy(PRIOR, log_likelihood, lambda t: t + NOISE * torch.randn_like(t))
    return trained(given, num_steps=100)


def test_evidence_and_p_value_are_the_exact_ones(exact):
    """At least 102 of 512 draws are effective: a standard error of 0.1 at most, of 300 values."""
    torch.manual_seed(1)
    x, x_o = simulate(200)[1], simulate(100)[1]
    found = misspecification_test(exact, x_o, x)
    for evidence, at in ((found.log_evidence, x_o), (found.simulated, x)):
        error = evidence - EVIDENCE.log_prob(at)
        assert float(error.abs().max()) < 4.5 * 0.1
        assert abs(float(error.mean())) < 0.05
    as_low = EVIDENCE.log_prob(x) <= EVIDENCE.log_prob(x_o).unsqueeze(1)
    assert torch.allclose(found.p_values, (1 + as_low.sum(1)) / 201, atol=0.1)


@pytest.mark.slow
def test_p_values_are_uniform_under_the_simulator_and_small_elsewhere():
    """By the default proxy, and with the simulations that training held out.

    Each of 100 alarms has probability 0.05. They share their 100 simulations, which doubles the
    variance of the share of alarms: a standard error of 0.031, of the mean p-value 0.041.
    """
    inference = trained(num=1_000)
    torch.manual_seed(1)
    found = misspecification_test(inference, simulate(100)[1])
    assert len(found.simulated) == len(inference.val_indices) == 100
    assert float((found.p_values <= 0.05).float().mean()) < 0.05 + 3.5 * 0.031
    assert abs(float(found.p_values.mean()) - 0.5) < 3.5 * 0.041
    far = torch.tensor([[5.0, 0.0], [0.0, 15.0], [4.0, -9.0], [1e8, 0.0], [1e15, 1.0], [3e38, 0.0]])
    assert bool((misspecification_test(inference, far).p_values < 0.02).all())


def test_the_words_say_what_to_do_and_the_result_repeats(exact):
    x_o = torch.tensor([[0.1, 0.3], [9.0, 0.0]])
    torch.manual_seed(2)
    x = simulate(100)[1]
    found = misspecification_test(exact, x_o, x)
    plausible, strange = str(found).splitlines()[1:]
    assert plausible.endswith("plausible")
    assert "x_o[1]" in strange
    assert "p = 0.0099, unlike the simulations" in strange
    assert found.p_values.equal(misspecification_test(exact, x_o, x).p_values)
    alone = misspecification_test(exact, x_o[0], x)
    assert alone.simulated.equal(found.simulated)
    assert torch.allclose(alone.p_values, found.p_values[:1], atol=0.1)


def test_bad_input(exact):
    x_o = torch.zeros(1, 2)
    with pytest.raises(TypeError, match="inference must be"):
        misspecification_test("inference", x_o)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no proxy"):
        misspecification_test(NPE_Jeffreys(PRIOR), x_o)
    with pytest.raises(RuntimeError, match="no proxy"):
        misspecification_test(NPE(PRIOR), x_o)
    with pytest.raises(ValueError, match="x_o must"):
        misspecification_test(exact, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="x_o must"):
        misspecification_test(exact, torch.full((1, 2), torch.nan))
    with pytest.raises(ValueError, match="at least 20 simulations, got 5"):
        misspecification_test(exact, x_o, torch.zeros(5, 2))
    ratio = trained(GivenProxy(PRIOR, log_likelihood), num=100, num_steps=1)
    with pytest.raises(ValueError, match=r"likelihood proxy, got GivenProxy.*calc_missp"):
        misspecification_test(ratio, x_o)
    assert not EnergyProxy(PRIOR).has_evidence


def test_after_several_rounds_simulations_of_the_prior_are_asked_for(exact, monkeypatch):
    monkeypatch.setattr(_sbi, "latest_round", lambda inference: 1)
    with pytest.raises(ValueError, match=r"x must be given after several rounds"):
        misspecification_test(exact, torch.zeros(1, 2))
    found = misspecification_test(exact, torch.zeros(1, 2), simulate(50)[1])
    assert float(found.p_values) > 0.05


@pytest.mark.parametrize("loc", [0.0, 2.0], ids=["of both signs", "nearly always positive"])
def test_limits_are_not_the_extremes_of_a_few_simulations(loc):
    """x_o and simulations are exchangeable: neither is more often beyond a limit than the other."""
    torch.manual_seed(0)
    seen, simulated, observed = (loc + torch.randn(num, 20) for num in (90, 2_000, 2_000))
    shares = [_beyond_a_limit(x, seen).float().mean() for x in (simulated, observed)]
    assert abs(float(shares[0] - shares[1])) < 4 * (0.5 / 2_000) ** 0.5
    if loc == 0.0:
        assert shares == [0.0, 0.0]


def test_limits_come_from_what_training_saw_and_hold_for_simulations_too(exact, monkeypatch):
    """With limits from the held-out few, a well-specified x_o was "beyond" them 1 time in 3."""
    torch.manual_seed(3)
    x_o = simulate(200)[1]
    asked = []

    def beyond(x: Tensor, seen: Tensor) -> Tensor:
        asked.append((len(x), len(seen)))
        return x[:, 0] < -2

    monkeypatch.setattr(misspecification, "_beyond_a_limit", beyond)
    found = misspecification_test(exact, x_o)
    assert asked == [(40 + 200, 360)]
    assert bool(torch.isneginf(found.log_evidence[x_o[:, 0] < -2]).all())
    held_out = exact.get_simulations(0)[1][exact.val_indices]
    assert torch.isneginf(found.simulated).equal(held_out[:, 0] < -2)
    assert "nan" not in str(found)


@pytest.mark.parametrize("kind", ["rain", pytest.param("squares", marks=pytest.mark.slow)])
def test_a_sentinel_for_missing_values_is_not_plausible(kind):
    """-999 is beyond a limit, at which there are simulations: dry days, or squares near zero."""
    torch.manual_seed(0)
    theta = PRIOR.sample((300,))
    noisy = theta + 0.5 * torch.randn(300, 2)
    x = noisy.clamp(min=0) if kind == "rain" else noisy.square()
    options = JeffreysOptions(num_steps=20, experts=EXPERTS, proxy_folds=1)
    inference = NPE_Jeffreys(PRIOR, options=options, show_progress_bars=False)
    inference.append_simulations(theta, x).train(max_num_epochs=5)
    found = misspecification_test(inference, torch.tensor([[-999.0, 0.2], [0.1, 0.2]]))
    assert found.p_values[0] <= 0.05
    assert found.p_values[1] > 0.05
    assert "x_o[0]: -inf nats" in str(found)


@pytest.mark.parametrize("constant", [1.0, 0.0, -250.0])
def test_another_value_of_an_output_that_never_varies_is_not_plausible(constant):
    torch.manual_seed(0)
    theta = PRIOR.sample((300,))
    x = torch.cat([theta + 0.5 * torch.randn(300, 2), torch.full((300, 1), constant)], dim=1)
    options = JeffreysOptions(num_steps=20, experts=EXPERTS, proxy_folds=1)
    inference = NPE_Jeffreys(PRIOR, options=options, show_progress_bars=False)
    inference.append_simulations(theta, x).train(max_num_epochs=5)
    values = torch.tensor([constant, constant * (1 + 1e-7), constant - 7, 1e6])
    found = misspecification_test(
        inference, torch.stack([torch.full((4,), 0.1), torch.full((4,), 0.2), values], dim=1)
    )
    assert (found.p_values > 0.05).tolist() == [True, True, False, False]

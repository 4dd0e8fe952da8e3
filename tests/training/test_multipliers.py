"""Multipliers on problems with a known saddle point, and that they are alive."""

import pytest
import torch

from sbi_jeffreys.training.multipliers import ResilientMultipliers, trust


def solve(price: float, max_multiplier: float = 100.0) -> tuple[float, float, float]:
    """min (φ − 2)² + ½ α ε² subject to φ − 1 ≤ ε, by primal descent and dual ascent."""
    phi = torch.tensor(0.0)
    multipliers = ResilientMultipliers(1, price, 0.05, max_multiplier, initial=0.0)
    for _ in range(4000):
        phi = phi - 0.02 * (2 * (phi - 2) + multipliers.multipliers[0])
        multipliers.update([float(phi) - 1.0])
    return float(phi), float(multipliers.multipliers[0]), float(multipliers.slack[0])


@pytest.mark.parametrize("price", [0.5, 2.0, 10.0])
def test_known_saddle_point(price):
    # Stationarity: 2(φ − 2) + λ = 0, λ = α ε, φ − 1 = ε  ⇒  ε = 2/(2 + α).
    phi, multiplier, slack = solve(price)
    assert slack == pytest.approx(2 / (2 + price), abs=1e-3)
    assert multiplier == pytest.approx(2 * price / (2 + price), abs=1e-3)
    assert phi == pytest.approx(1 + 2 / (2 + price), abs=1e-3)


def test_huber_price_caps_the_multiplier():
    assert solve(10.0, max_multiplier=0.5)[1] == pytest.approx(0.5)


def test_satisfied_constraint_loses_its_multiplier():
    multipliers = ResilientMultipliers(1, initial=5.0)
    for _ in range(100):
        multipliers.update([-0.1])
    assert float(multipliers.multipliers) == 0.0


def test_multipliers_and_slack_are_alive():
    multipliers = ResilientMultipliers(2, initial=1.0)
    before = multipliers.multipliers.clone(), multipliers.slack.clone()
    multipliers.update([0.5, -0.5])
    assert multipliers.multipliers[0] > before[0][0]
    assert multipliers.multipliers[1] < before[0][1]
    assert bool((multipliers.slack != before[1]).all())


def test_non_finite_violation_leaves_its_multiplier():
    multipliers = ResilientMultipliers(2, initial=1.0)
    multipliers.update([float("nan"), 1.0])
    assert multipliers.multipliers[0] == 1.0
    assert multipliers.multipliers[1] > 1.0


def test_state_dict_round_trip():
    multipliers = ResilientMultipliers(1)
    multipliers.update([1.0])
    other = ResilientMultipliers(1)
    other.load_state_dict(multipliers.state_dict())
    assert torch.equal(other.multipliers, multipliers.multipliers)
    assert torch.equal(other.slack, multipliers.slack)


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"price": 0.0}, "price"),
        ({"step_size": 1.5}, "step_size"),
        ({"step_size": -1.0}, "step_size"),
        ({"max_multiplier": 0.0}, "max_multiplier"),
        ({"initial": -1.0}, "initial"),
        ({"initial": 1e6}, "initial"),
        ({"num_constraints": 0}, "num_constraints"),
    ],
)
def test_bad_arguments_are_named(kwargs, name):
    with pytest.raises(ValueError, match=name):
        ResilientMultipliers(**kwargs)


def test_wrong_number_of_violations():
    with pytest.raises(ValueError, match="one value per constraint"):
        ResilientMultipliers(2).update([1.0])


def test_trust_is_a_capped_likelihood_ratio():
    assert float(trust(1.0, 2.0)) == 1.0
    assert float(trust(3.0, 2.0)) == pytest.approx(0.36788, abs=1e-4)
    assert float(trust(float("inf"), 2.0)) == 0.0
    assert float(trust(float("nan"), 2.0)) == 0.0

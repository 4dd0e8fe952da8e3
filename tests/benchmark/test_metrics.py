"""Metrics against truths that are known in closed form."""

import math

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

from sbi_jeffreys.benchmark.metrics import c2st, evaluate_pairs, mode_l1, true_divergences
from sbi_jeffreys.benchmark.tasks import get_task
from sbi_jeffreys.benchmark.tasks.base import Task
from sbi_jeffreys.diagnostics.calibration import (
    PairDraws,
    expected_coverage,
    held_out_nll,
    inside_prior,
    leakage,
)

_NOISE = 0.5


class ConjugateGaussian(Task):
    """θ ∼ N(0, I₂), x ∼ N(θ, ¼ I₂): posterior N(x/1.25, 0.2 I₂), evidence N(0, 1.25 I₂)."""

    name, dim_theta, dim_x = "conjugate_gaussian", 2, 2

    def __init__(self) -> None:
        self.prior = MultivariateNormal(torch.zeros(2), torch.eye(2))

    def simulate(self, theta):
        return theta + _NOISE * torch.randn_like(theta)

    def log_likelihood(self, theta, x):
        return Normal(theta, _NOISE).log_prob(x).sum(-1)

    def sample_reference(self, x, num_samples):
        return gaussian(x[None]).sample((num_samples,))[:, 0]


def gaussian(x, scale=1.0, shift=0.0):
    """The posterior at x `(B, 2)`, its standard deviation times `scale`, shifted."""
    deviation = scale * math.sqrt(0.2)
    return Independent(Normal(x / 1.25 + shift, deviation), 1)


def pair_draws(scale=1.0, shift=0.0, num_pairs=1000, num_draws=200):
    task = ConjugateGaussian()
    theta, x = task.simulate_joint(num_pairs)
    approximation = gaussian(x, scale, shift)
    drawn = approximation.sample((num_draws,))
    draws = PairDraws(drawn, approximation.log_prob(drawn), approximation.log_prob(theta))
    return task, theta, x, draws


def test_c2st_is_half_for_equal_laws_and_one_for_separate_ones():
    a, b = torch.randn(600, 2), torch.randn(600, 2)
    assert c2st(a, b) == pytest.approx(0.5, abs=0.05)
    assert c2st(a, b + 20) > 0.99
    assert c2st(a, b) == c2st(a, b)  # seeded


def test_c2st_does_not_depend_on_units():
    scale = torch.tensor([1e4, 1e-4])
    a, b = torch.randn(300, 2), torch.randn(300, 2) + 0.5
    assert c2st(scale * a, scale * b) == pytest.approx(c2st(a, b), abs=0.03)


@pytest.mark.parametrize(
    ("samples", "message"),
    [(torch.randn(50, 3), "samples: expected shape"), (torch.full((50, 2), math.nan), "finite")],
)
def test_c2st_says_what_is_wrong(samples, message):
    with pytest.raises(ValueError, match=message):
        c2st(torch.randn(50, 2), samples)


def test_coverage_of_the_exact_posterior_is_nominal():
    _, _, _, draws = pair_draws()
    for entry in expected_coverage(draws, torch.ones_like(draws.log_prob, dtype=torch.bool)):
        error = math.sqrt(entry.level * (1 - entry.level) / 1000)
        assert abs(entry.value - entry.level) < 3.5 * error
        value = entry.value
        assert entry.standard_error == pytest.approx(math.sqrt(value * (1 - value) / 1000))


@pytest.mark.parametrize("scale", [0.6, 1.6])
def test_coverage_of_a_gaussian_of_wrong_width_is_the_chi_squared_one(scale):
    # HPD of level a is |z|² ≤ −2 log(1 − a) in units of its own width, in two dimensions.
    _, _, _, draws = pair_draws(scale)
    inside = torch.ones_like(draws.log_prob, dtype=torch.bool)
    for entry in expected_coverage(draws, inside, levels=(0.5, 0.9)):
        expected = 1 - (1 - entry.level) ** (scale**2)
        assert entry.value == pytest.approx(expected, abs=0.06)
        assert (entry.value < entry.level) == (scale < 1)


def test_weights_turn_draws_of_another_distribution_into_the_posterior():
    task, theta, x, wide = pair_draws(scale=1.5, num_draws=500)
    exact = gaussian(x)
    log_q = exact.log_prob(wide.theta) + 7.0  # unnormalised: the constant must not matter
    draws = PairDraws(
        wide.theta, log_q, exact.log_prob(theta) + 7.0, log_q - wide.log_prob, normalised=False
    )
    metrics = evaluate_pairs(task, theta, x, draws)
    for level in (50, 90, 95):
        assert metrics[f"coverage_{level}"] == pytest.approx(level / 100, abs=0.04)
    assert math.isnan(metrics["nll"])
    assert "jeffreys" not in metrics


def test_pairs_without_a_draw_inside_are_not_covered():
    _, _, _, draws = pair_draws(num_pairs=10, num_draws=5)
    nothing = torch.zeros_like(draws.log_prob, dtype=torch.bool)
    assert [entry.value for entry in expected_coverage(draws, nothing)] == [0.0, 0.0, 0.0]


def test_nll_of_the_exact_posterior_is_its_entropy():
    _, _, _, draws = pair_draws(num_pairs=4000, num_draws=2)
    entropy = math.log(2 * math.pi * math.e * 0.2)
    value, error = held_out_nll(draws.log_prob_true)
    assert abs(value - entropy) < 4 * error
    assert error == pytest.approx(1 / math.sqrt(4000), rel=0.1)  # Var of χ²₂ / 2 is 1


def test_leakage_is_the_mass_outside_the_prior():
    prior = get_task("two_moons").prior  # the square (−1, 1)²
    theta = Normal(1.0, 0.1).sample((20_000, 2))
    theta[:, 1] = 0.0
    assert leakage(inside_prior(prior, theta)) == pytest.approx(0.5, abs=0.02)
    assert leakage(inside_prior(prior, torch.full((3, 2), math.nan))) == 1.0


def test_the_distance_of_mode_masses():
    task, x = get_task("two_moons"), torch.zeros(2)
    both, one = torch.tensor([[0.5, 0.5], [-0.5, -0.5]]), torch.tensor([[0.5, 0.5]] * 2)
    assert mode_l1(task, x, both, both) == 0.0
    assert mode_l1(task, x, both, one) == 1.0
    three_to_one = torch.cat([one, both])
    assert mode_l1(task, x, both, three_to_one) == 0.5
    assert math.isnan(mode_l1(ConjugateGaussian(), x, both, one))


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.7, 0.0), (1.4, 0.2)])
def test_divergences_are_those_between_gaussians(scale, shift):
    task, theta, x, draws = pair_draws(scale, shift, num_pairs=3000)
    inside = torch.ones_like(draws.log_prob, dtype=torch.bool)
    found = true_divergences(task, theta, x, draws, inside)
    offset = 2 * shift**2 / 0.2
    forward = (1 + offset / 2) / scale**2 - 1 + 2 * math.log(scale)
    reverse = scale**2 + offset / 2 - 1 - 2 * math.log(scale)
    log_evidence = -math.log(2 * math.pi * 1.25) - 1  # E log N(x; 0, 1.25 I₂)
    assert found["jeffreys"] == pytest.approx(forward + reverse, abs=0.12)
    assert found["kl_forward"] == pytest.approx(forward + log_evidence, abs=0.12)
    assert found["kl_reverse"] == pytest.approx(reverse - log_evidence, abs=0.12)
    assert found["zero_likelihood"] == 0.0


def test_pairs_without_a_usable_draw_do_not_shift_the_jeffreys_divergence():
    task, theta, x, draws = pair_draws()
    inside = torch.ones_like(draws.log_prob, dtype=torch.bool)
    outside = x.square().sum(1) > 2.5  # where p(x) is low; half of them
    inside[:, outside] = False
    whole = true_divergences(task, theta, x, draws, torch.ones_like(inside))
    part = true_divergences(task, theta, x, draws, inside)
    assert part["kl_reverse"] < whole["kl_reverse"] - 0.3
    assert part["jeffreys"] == pytest.approx(0.0, abs=0.1)  # the exact posterior's
    assert whole["jeffreys"] == pytest.approx(0.0, abs=0.1)


def test_leaked_mass_does_not_count_against_the_truncated_posterior():
    # A uniform posterior on [−1, 1]² with half of an approximation's mass outside: exact once cut.
    task = get_task("two_moons")
    theta, x = task.simulate_joint(50)
    drawn = torch.rand(400, 50, 2) * 2 - 1
    drawn[::2] += 5
    inside = inside_prior(task.prior, drawn)
    assert leakage(inside) == 0.5
    half = torch.full((400, 50), math.log(0.5 / 4))
    whole = torch.full((200, 50), math.log(1 / 4))
    cut = true_divergences(task, theta, x, PairDraws(drawn, half, half[0]), inside)
    same = true_divergences(task, theta, x, PairDraws(drawn[1::2], whole, whole[0]), inside[1::2])
    assert cut["kl_forward"] == pytest.approx(same["kl_forward"], abs=1e-4)
    assert same["zero_likelihood"] > 0  # two moons' likelihood vanishes on half of the square


def test_flat_names_levels_and_errors():
    task, theta, x, draws = pair_draws(num_pairs=20, num_draws=10)
    flat = evaluate_pairs(task, theta, x, draws)
    assert {"nll", "leakage", "coverage_50", "coverage_90_se", "coverage_95", "jeffreys"} <= set(
        flat
    )

"""The corrected posterior: draws, density and power of the pool, against closed forms."""

import math
import warnings

import pytest
import torch
from known_posteriors import PRIOR, SPREAD, Known, gaussian, log_likelihood, pairs
from sbi.utils import BoxUniform
from torch.distributions import Independent, Normal

from sbi_jeffreys import (
    CorrectedPosterior,
    GivenProxy,
    JeffreysOptions,
    JeffreysWarning,
    NPE_Jeffreys,
    held_out_report,
)
from sbi_jeffreys.posteriors import best_power, pooling_power
from sbi_jeffreys.posteriors.power import log_pool, power_of_later_rounds

pytestmark = pytest.mark.filterwarnings("ignore:.*no parameters/buffers")

X = torch.tensor([0.5, -1.0])


def corrected(power, shift=1.0):
    """The main is `shift` standard deviations off in both dimensions, the proxy is exact."""
    main, proxy = Known(gaussian(shift=shift)), GivenProxy(PRIOR, log_likelihood)
    return CorrectedPosterior(main, proxy, PRIOR, power=power)


@pytest.mark.parametrize(
    ("main", "proxy", "power"),
    [(1.0, -1.0, 0.5), (1.0, -0.5, 2 / 3), (1.0, 0.0, 1.0), (0, 1, 0.05)],
)
def test_best_power_is_where_the_pool_of_two_gaussians_is_the_truth(main, proxy, power):
    # Means m and p, truth 0: the pool has mean (1 − β) m + β p. Standard error of β: at most 0.016.
    def log_ratio(theta):
        return Normal(proxy, 1.0).log_prob(theta) - Normal(main, 1.0).log_prob(theta)

    draws = main + torch.randn(2000, 2000)
    assert best_power(log_ratio(draws), log_ratio(torch.randn(2000))) == pytest.approx(
        power, abs=0.06
    )


@pytest.mark.parametrize("power", [0.3, 1.0])
def test_map_is_the_mode_of_the_target(power):
    posterior = corrected(power).set_default_x(X)
    found = posterior.map(num_iter=300, learning_rate=0.01, show_progress_bars=False)
    assert torch.allclose(found, X / 1.25 + (1 - power) * SPREAD, atol=0.02)
    posterior.power = 0.6
    theta = X.unsqueeze(0)
    expected = posterior.log_prob(theta, norm_posterior=False)
    assert torch.allclose(posterior.potential(theta), expected, atol=1e-5)
    with pytest.raises(ValueError, match="one observation"):
        posterior.set_default_x(torch.stack([X, X])).potential(torch.zeros(1, 2))


def test_best_power_survives_a_proxy_without_mass_at_a_true_parameter():
    true = torch.zeros(20)
    true[3] = -math.inf
    assert 0 < best_power(torch.randn(50, 20), true) <= 1


def test_pooling_power_reads_main_and_proxy_at_the_pairs():
    theta, x = pairs(200)
    proxy = GivenProxy(PRIOR, log_likelihood)
    wrong_proxy = GivenProxy(PRIOR, lambda theta, x: log_likelihood(theta + SPREAD, x))
    before = torch.get_rng_state()
    assert pooling_power(Known(gaussian(shift=1.0)), proxy, theta, x) >= 0.85
    assert pooling_power(Known(gaussian()), wrong_proxy, theta, x) <= 0.15
    assert torch.equal(before, torch.get_rng_state())


def test_the_power_of_later_rounds_does_not_depend_on_the_proposal():
    """θ comes from a narrow proposal beside the prior's centre."""
    torch.manual_seed(2)
    theta = torch.tensor([0.7, -0.4]) + 0.5 * torch.randn(200, 2)
    x = theta + 0.5 * torch.randn_like(theta)
    proxy = GivenProxy(PRIOR, log_likelihood)
    wrong_proxy = GivenProxy(PRIOR, lambda theta, x: log_likelihood(theta + SPREAD, x))
    assert power_of_later_rounds(Known(gaussian(shift=1.0)), proxy, theta, x) >= 0.8
    assert power_of_later_rounds(Known(gaussian()), wrong_proxy, theta, x) <= 0.2
    # Between them, half of the way is the truth.
    behind = Known(gaussian(shift=1.0))
    assert 0.3 <= power_of_later_rounds(behind, wrong_proxy, theta, x) <= 0.7


@pytest.mark.parametrize("power", [0.3, 1.0])
def test_draws_and_density_are_those_of_the_pool(power):
    posterior = corrected(power)
    pool = Independent(Normal(X / 1.25 + (1 - power) * SPREAD, SPREAD), 1)
    num = 4000
    samples = posterior.sample((num,), x=X, show_progress_bars=False)
    # Resampled from 20,000 candidates whose effective share is exp(−2β²): at least 2,700.
    assert float((samples.mean(0) - pool.mean).abs().max()) < 4 * SPREAD * math.sqrt(
        1 / num + 1 / 2700
    )
    theta = pool.sample((50,))
    error = (posterior.log_prob(theta, x=X) - pool.log_prob(theta)).abs().max()
    assert float(error) < 4 * math.sqrt((math.exp(2 * power**2) - 1) / 10_000) + 1e-4
    potential = posterior.set_default_x(X).potential(theta)
    assert torch.allclose(potential, posterior.log_prob(theta, norm_posterior=False), atol=1e-4)
    batched = posterior.log_prob_batched(theta.unsqueeze(1), X.unsqueeze(0))[:, 0]
    assert float((batched - pool.log_prob(theta)).abs().max()) < 0.15


def test_effective_sample_size_is_that_of_the_weights_to_the_pool():
    # Two dimensions, a shift of β standard deviations in each: E[w]² / E[w²] = exp(−2β²).
    for power in (0.3, 0.7):
        share = corrected(power).effective_sample_size(X, num_candidates=20_000)
        assert share == pytest.approx(math.exp(-2 * power**2), abs=0.05)


def test_outside_the_prior_there_is_no_mass_whatever_the_power():
    box = BoxUniform(-torch.ones(2), torch.ones(2))
    main, proxy = Known(gaussian()), GivenProxy(box, log_likelihood)
    posterior = CorrectedPosterior(main, proxy, box, power=0.05)
    samples = posterior.sample((1000,), x=torch.tensor([1.2, 1.2]), show_progress_bars=False)
    assert bool((samples.abs() <= 1).all())
    outside = posterior.log_prob(torch.tensor([[1.5, 0.0]]), x=X)
    assert bool(torch.isneginf(outside).all())


def test_held_out_report_reads_the_pool():
    theta, x = pairs(500)
    report = held_out_report(corrected(0.5), theta, x, num_samples=400)
    nll = math.log(2 * math.pi * math.e * 0.2) + 0.25  # half a standard deviation off, twice
    assert abs(report.forward - nll) < 4 * report.forward_error + 0.01


def test_the_trainer_chooses_the_power_by_held_out_simulations(monkeypatch):
    theta, x = pairs(300)
    too_sure = GivenProxy(PRIOR, lambda theta, x: 2 * log_likelihood(theta, x))
    options = JeffreysOptions(num_steps=20, proxy=too_sure)
    inference = NPE_Jeffreys(PRIOR, "mdn", show_progress_bars=False, options=options)
    inference.append_simulations(theta, x).train(max_num_epochs=2)
    rows = inference.val_indices
    power = pooling_power(inference._neural_net, inference.proxy, theta[rows], x[rows])
    assert 0.1 < power < 0.9  # a posterior of half the variance against two epochs
    assert inference.build_corrected_posterior().power == power
    assert inference.build_corrected_posterior(power=0.2).power == 0.2
    monkeypatch.setattr(inference, "_data_round_index", [1])  # held-out pairs from a proposal
    expected = power_of_later_rounds(inference._neural_net, inference.proxy, theta[rows], x[rows])
    assert expected not in (power, 1.0)
    assert inference.build_corrected_posterior().power == expected


@pytest.mark.parametrize("power", [0.0, -1, 1.5, math.nan])
def test_a_power_out_of_range_is_refused(power):
    with pytest.raises(
        ValueError, match=r"power must be a finite number in \(0, 1\].*build_posterior"
    ):
        corrected(power)


@pytest.mark.parametrize("power", ["half", True])
def test_a_power_that_is_no_number_is_refused(power):
    with pytest.raises(TypeError, match=r"power must be a number in \(0, 1\].*build_posterior"):
        corrected(power)


def test_moving_it_keeps_the_potential_of_the_pool():
    box = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
    main, proxy = Known(gaussian(shift=1.0)), GivenProxy(box, log_likelihood)
    posterior = CorrectedPosterior(main, proxy, box).set_default_x(X)
    theta = X.unsqueeze(0)
    before = posterior.potential(theta)
    posterior.to("cpu")
    assert torch.equal(posterior.potential(theta), before)
    assert torch.equal(posterior.log_prob(theta, norm_posterior=False), before)


@pytest.mark.parametrize(("power", "expected"), [(1.0, -0.5), (0.5, -math.inf)])
def test_where_the_main_alone_has_no_mass_there_is_a_number(power, expected):
    nowhere, log_q = torch.tensor([-math.inf]), torch.tensor([-0.5])
    assert float(log_pool(nowhere, log_q, power)) == expected
    assert float(log_pool(log_q, nowhere, power)) == -math.inf


def test_one_candidate_is_enough_for_a_density():
    posterior = CorrectedPosterior(
        Known(gaussian(shift=1.0)), GivenProxy(PRIOR, log_likelihood), PRIOR, num_candidates=1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JeffreysWarning)
        assert bool(torch.isfinite(posterior.log_prob(X.unsqueeze(0), x=X)).all())

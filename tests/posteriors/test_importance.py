"""Importance weights: Pareto k̂ against known tails, the cache, warnings, many observations."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from known_posteriors import PRIOR, SPREAD, Known, gaussian, log_likelihood
from sbi.utils import BoxUniform
from scipy.stats import genpareto
from torch.distributions import Independent, Normal

from sbi_jeffreys import CorrectedPosterior, GivenProxy
from sbi_jeffreys._checks import JeffreysWarning
from sbi_jeffreys.posteriors import ImportanceQuality, candidates, pareto_k

pytestmark = pytest.mark.filterwarnings("ignore:.*no parameters/buffers")

X = torch.tensor([0.5, -1.0])
FAR = torch.tensor([8.0, -8.0])


class Counting(GivenProxy):
    """The exact likelihood, counting the θ that it was evaluated at."""

    evaluated = 0

    def log_factor(self, theta, x):
        self.evaluated += theta.shape[0] * theta.shape[1]
        return super().log_factor(theta, x)


def law(x):
    """A main that is good near the origin, and far from it shrinks towards the prior."""
    return Independent(Normal(x / 1.25 * (1 - x.abs() / 16), SPREAD * 1.1), 1)


def corrected(law=law, **kwargs):
    return CorrectedPosterior(Known(law), Counting(PRIOR, log_likelihood), PRIOR, **kwargs)


def sample(posterior, num=500, x=X):
    return posterior.sample((num,), x=x, show_progress_bars=False)


# ------------------------------------------------------------------ Pareto k̂


@pytest.mark.parametrize("shape", [-0.3, 0.2, 0.7, 1.5])
def test_pareto_k_is_the_shape_of_a_generalised_pareto_tail(shape):
    # A generalised Pareto distribution's exceedances over any threshold have the same shape.
    values, size = [], 20_000
    for seed in range(10):
        weights = genpareto.rvs(shape, size=size, random_state=seed) + 1.0
        values.append(pareto_k(torch.as_tensor(weights).log()))
    error = (1 + shape) / math.sqrt(3 * math.sqrt(size))  # of one maximum-likelihood fit
    assert sum(values) / 10 == pytest.approx(shape, abs=3 * error / math.sqrt(10) + 0.02)


def test_pareto_k_depends_on_the_tail_alone():
    weights = torch.as_tensor(genpareto.rvs(0.6, size=5_000, random_state=0)).log()
    value = pareto_k(weights)
    assert pareto_k(weights + 1_000.0) == pytest.approx(value, abs=1e-3)
    with_zeros = torch.cat([weights, torch.full((20_000,), -math.inf)])
    assert pareto_k(with_zeros) == pytest.approx(value, abs=1e-3)


def test_pareto_k_is_not_that_of_the_bulk():
    # Uniform weights, but for the largest 3 %: of 20,000 the tail is the largest 424.
    tail = 1 + genpareto.rvs(0.5, size=600, random_state=0)
    bulk = torch.rand(19_400, dtype=torch.float64)
    value = pareto_k(torch.cat([bulk, torch.as_tensor(tail)]).log())
    assert value == pytest.approx(0.5, abs=3 * 1.5 / math.sqrt(424))


def test_pareto_k_of_degenerate_weights():
    assert pareto_k(torch.zeros(1_000)) == -math.inf
    assert pareto_k(torch.full((1_000,), -math.inf)) == math.inf
    assert pareto_k(torch.tensor([0.0, math.inf]).repeat(500)) == math.inf
    one = torch.full((1_000,), -math.inf)
    one[3] = 0.0
    assert pareto_k(one) == math.inf


@pytest.mark.parametrize("scale", [0.5, 0.8])
def test_pareto_k_of_a_main_that_is_too_narrow(scale):
    # In two dimensions log w = (1 − s²) r²/2, and r²/2 is exponential: w is Pareto, k = 1 − s².
    posterior = corrected(gaussian(scale))
    k = 1 - scale**2
    assert posterior.quality(X).pareto_k == pytest.approx(k, abs=3 * (1 + k) / math.sqrt(424))


def test_quality_of_a_main_that_is_too_wide():
    quality = corrected(gaussian(1.5)).quality(X)
    assert quality.effective_sample_size == pytest.approx((2 - 1.5**-2) / 1.5**2, abs=0.03)
    assert quality.num_candidates == 20_000
    assert quality.pareto_k < 0.1  # the weights are bounded
    assert quality.reliable
    posterior = corrected(gaussian(1.5))
    assert posterior.effective_sample_size(X) == quality.effective_sample_size


@pytest.mark.parametrize(
    ("share", "k", "num", "reliable"),
    [
        (0.5, 0.3, 1_000, True),
        (0.05, 0.3, 1_000, False),
        (0.05, 0.3, 20_000, True),
        (0.45, 0.8, 20_000, False),
        (0.98, 0.85, 20_000, True),  # nearly equal weights: their tail is of few draws
        (0.98, 0.85, 50, False),
        (0.0, math.inf, 20_000, False),
    ],
)
def test_what_is_reliable(share, k, num, reliable):
    assert ImportanceQuality(share, k, num).reliable is reliable


# ------------------------------------------------------------------ warnings


def test_unreliable_draws_warn_and_healthy_ones_do_not():
    posterior = corrected()
    with warnings.catch_warnings():
        warnings.simplefilter("error", JeffreysWarning)
        sample(posterior)
        posterior.log_prob(torch.zeros(3, 2), x=X)
        posterior.sample_batched((100,), torch.stack([X, 0 * X]), show_progress_bars=False)
    with pytest.warns(JeffreysWarning, match=r"disagree.*adapted to the proxy.*misspecification"):
        sample(posterior, x=FAR)
    with pytest.warns(JeffreysWarning, match="disagree at this observation"):
        posterior.log_prob(torch.zeros(3, 2), x=FAR)
    both = torch.stack([X, FAR, FAR])
    with pytest.warns(JeffreysWarning, match="2 of 3 x") as caught:
        posterior.sample_batched((100,), both, show_progress_bars=False)
    assert len([w for w in caught if w.category is JeffreysWarning]) == 1
    with pytest.warns(JeffreysWarning, match="2 of 3 x"):
        posterior.log_prob_batched(torch.zeros(1, 3, 2), both)


@pytest.mark.parametrize("adapted", [True, False])
def test_the_warning_names_the_callers_line(adapted, monkeypatch):
    if not adapted:
        monkeypatch.setattr(candidates, "adapted_candidates", without_adaptation)
    posterior = corrected()
    for call in (sample, lambda posterior, x: posterior.log_prob(torch.zeros(3, 2), x=x)):
        with pytest.warns(JeffreysWarning) as caught:
            call(posterior, x=FAR)
        (warning,) = [w for w in caught if w.category is JeffreysWarning]
        assert warning.filename == __file__


def without_adaptation(main, proxy, log_target, x, num):
    """As if the adapted proposal had been no better than the main."""

    def log_potential(theta, x, log_p):
        return log_target(theta, proxy.log_potential(theta, x))

    return candidates.draw_candidates(main, log_potential, x, num, num)


@pytest.mark.filterwarnings("ignore:Main and proxy disagree")
def test_where_the_main_is_far_off_the_draws_follow_the_proxy_all_the_same():
    """The exact posterior at FAR is N(x / 1.25, 0.2 I), seven standard deviations from the main."""
    torch.manual_seed(3)
    posterior = corrected()
    draws, expected = sample(posterior, 2000, FAR), Independent(Normal(FAR / 1.25, SPREAD), 1)
    assert torch.allclose(draws.mean(dim=0), FAR / 1.25, atol=5 * SPREAD / math.sqrt(1000))
    assert torch.allclose(draws.std(dim=0), torch.tensor(SPREAD), rtol=0.12)
    assert len(draws.unique(dim=0)) > 1000
    theta = draws[:20]
    assert torch.allclose(posterior.log_prob(theta, FAR), expected.log_prob(theta), atol=0.1)
    assert posterior.effective_sample_size(FAR) < 0.01  # of the main's draws


@pytest.mark.filterwarnings("ignore:Main and proxy disagree")
def test_many_draws_of_an_adapted_proposal_are_of_many_candidates():
    """10,000 candidates, whatever was asked for, made every fifth of 10,000 draws a copy."""
    torch.manual_seed(3)
    draws = sample(corrected(), 10_000, FAR)
    assert len(draws.unique(dim=0)) > 8_000


def test_draws_that_no_proposal_mends_warn(monkeypatch):
    monkeypatch.setattr(candidates, "adapted_candidates", without_adaptation)
    with pytest.warns(JeffreysWarning, match=r"this observation.*Pareto k̂.*build_posterior\(\)"):
        draws = sample(corrected(), x=FAR)
    assert len(draws.unique(dim=0)) > 450  # copies are moved, and the warning is given all the same


# ------------------------------------------------------------------ the cache


def test_candidates_at_one_x_are_drawn_once():
    posterior = corrected()
    sample(posterior)
    assert posterior.proxy.evaluated == 20_000
    sample(posterior)
    posterior.quality(X)
    posterior.weighted_sample(20_000, X)
    assert posterior.proxy.evaluated == 20_000
    posterior.log_prob(torch.zeros(7, 2), x=X)
    assert posterior.proxy.evaluated == 20_007


def test_other_x_power_number_or_seed_have_other_candidates():
    posterior = corrected()
    first = posterior.weighted_sample(100, X)[0]
    assert torch.equal(first, posterior.weighted_sample(100, X)[0])
    assert not torch.equal(first - X, posterior.weighted_sample(100, 0 * X)[0])
    assert posterior.weighted_sample(50, X)[0].shape == (50, 2)
    torch.manual_seed(1)
    assert not torch.equal(first, posterior.weighted_sample(100, X)[0])
    torch.manual_seed(0)
    assert torch.equal(first, posterior.weighted_sample(100, X)[0])
    before = posterior.weighted_sample(100, X)[1]
    posterior.power = 0.5
    assert not torch.equal(before, posterior.weighted_sample(100, X)[1])


def test_the_cache_changes_no_value():
    posterior = corrected()
    torch.manual_seed(3)
    torch.rand(5)
    sample(posterior)  # fills the cache at another state of the generator
    torch.manual_seed(3)
    warm = [sample(posterior) for _ in range(2)]
    posterior.clear_cache()
    torch.manual_seed(3)
    cold = [sample(posterior) for _ in range(2)]
    assert torch.equal(torch.stack(warm), torch.stack(cold))
    assert not torch.equal(warm[0], warm[1])


def test_drawing_candidates_leaves_the_generator_alone():
    posterior = corrected()
    before = torch.get_rng_state()
    posterior.quality(X)
    assert torch.equal(before, torch.get_rng_state())


def test_what_weighted_sample_returns_can_be_changed():
    posterior = corrected()
    theta, log_weights = posterior.weighted_sample(100, X)
    expected = theta.clone()
    theta.zero_(), log_weights.zero_()
    assert torch.equal(posterior.weighted_sample(100, X)[0], expected)


def test_the_cache_is_bounded_and_moving_empties_it(monkeypatch):
    box = BoxUniform(-4 * torch.ones(2), 4 * torch.ones(2))
    posterior = CorrectedPosterior(Known(law), GivenProxy(box, log_likelihood), box, 1_000)
    for k in range(9):
        posterior.quality(X + k / 100)
    assert len(posterior._cache) == 4
    posterior.to("cpu")
    assert len(posterior._cache) == 0
    monkeypatch.setattr(candidates, "_MAX_NUMBERS", 5_000)  # 3,000 per entry
    posterior.quality(X)
    posterior.quality(0 * X)
    assert len(posterior._cache) == 1
    posterior.quality(0 * X, num_candidates=2_000)  # more than all of it
    assert len(posterior._cache) == 0


def test_copies_and_pickles_start_without_candidates():
    posterior = corrected()
    posterior.quality(X)
    assert len(posterior._cache) == 1
    assert len(copy.deepcopy(posterior)._cache) == 0
    assert len(pickle.loads(pickle.dumps(posterior._cache))) == 0
    assert len(posterior._cache) == 1


# ------------------------------------------------------------------ many observations


@pytest.mark.parametrize("power", [0.3, 1.0])
def test_batched_draws_are_those_of_the_pool_at_each_observation(power):
    posterior = corrected(gaussian(shift=1.0), power=power)
    x = torch.stack([X, -X, 2 * X, 0 * X, X + 1])
    draws = posterior.sample_batched((1_000,), x, show_progress_bars=False)
    assert draws.shape == (1_000, 5, 2)
    # 4,000 candidates, of which exp(−2β²) are effective.
    error = SPREAD * math.sqrt(1 / 1_000 + 1 / (4_000 * math.exp(-2 * power**2)))
    mean = x / 1.25 + (1 - power) * SPREAD
    assert float((draws.mean(0) - mean).abs().max()) < 4.5 * error
    assert draws.std(0).mean() == pytest.approx(SPREAD, rel=0.06)


def test_batched_draws_take_few_candidates_unless_told_otherwise():
    posterior = corrected(gaussian())
    x = torch.stack([X, -X, 0 * X])
    posterior.sample_batched((10,), x, show_progress_bars=False)
    assert posterior.proxy.evaluated == 3 * 2_000
    posterior.sample_batched((1_000,), x, show_progress_bars=False)
    assert posterior.proxy.evaluated == 3 * 6_000
    posterior.sample_batched((10,), x, show_progress_bars=False, num_candidates=50_000)
    assert posterior.proxy.evaluated == 3 * 56_000
    few = corrected(gaussian(), num_candidates=300)
    few.sample_batched((10,), x, show_progress_bars=False)
    assert few.proxy.evaluated == 3 * 300


def test_resampled_draws_are_in_random_order():
    numbered = torch.arange(1_000.0).reshape(-1, 1, 1).expand(-1, 2, 1)
    found = candidates.Candidates(numbered, torch.zeros(1_000, 2))
    draws = candidates.resample(found, 500)[..., 0]
    for column in draws.T:
        steps = column.diff()
        assert 0.4 < float((steps > 0).double().mean()) < 0.6
        assert len(column.unique()) == 500  # equal weights: systematic, so nothing is drawn twice
    assert not torch.equal(draws[:, 0], draws[:, 1])


def test_batched_shapes_and_calls_of_the_network():
    calls = []

    def counted(x):
        calls.append(len(x))
        return gaussian()(x)

    posterior = corrected(counted)
    draws = posterior.sample_batched((3, 4), torch.randn(12, 2), show_progress_bars=False)
    assert draws.shape == (3, 4, 12, 2)
    assert calls == [5, 5, 5, 5, 2, 2]  # 10,000 // 2,000 observations at once: sample, log_prob
    assert posterior.sample_batched((), torch.zeros(2, 2), show_progress_bars=False).shape == (2, 2)


def test_batched_densities_are_those_of_single_observations():
    posterior = corrected(gaussian(shift=0.5))
    x, theta = torch.stack([X, -X]), torch.randn(6, 2, 2) / 2
    both = posterior.log_prob_batched(theta, x)
    single = torch.stack([posterior.log_prob(theta[:, b], x=x[b]) for b in range(2)], dim=1)
    assert both.shape == (6, 2)
    error = math.sqrt(2 * (math.exp(0.5) - 1) / 20_000)  # of two estimates of one normaliser
    assert float((both - single).abs().max()) < 4 * error
    raw = posterior.log_prob_batched(theta[0], x, norm_posterior=False)
    assert torch.allclose(raw[0, 0], posterior.log_prob(theta[0, :1], X, norm_posterior=False))


def test_no_mass_at_an_observation_is_named():
    def nowhere(theta, x):
        return torch.where(x[:, 0] > 5, -math.inf, log_likelihood(theta, x))

    posterior = CorrectedPosterior(Known(gaussian()), GivenProxy(PRIOR, nowhere), PRIOR)
    with pytest.raises(RuntimeError, match=r"observations \[1\]: the two disagree entirely"):
        posterior.sample_batched((5,), torch.stack([X, FAR]), show_progress_bars=False)
    with pytest.raises(RuntimeError, match="this observation"):
        sample(posterior, x=FAR)

"""Diagnostics must pass the exact posterior and fail every wrong one that is built here by hand."""

import math

import pytest
import torch
from known_posteriors import NOISE, PRIOR, Known, gaussian, log_likelihood, pairs, two_modes
from sbi.inference import NPE
from sbi.inference.posteriors import DirectPosterior, EnsemblePosterior
from sbi.utils import BoxUniform
from torch.distributions import Independent, Normal

from sbi_jeffreys import (
    CorrectedPosterior,
    GivenProxy,
    HeldOutReport,
    JeffreysOptions,
    NPE_Jeffreys,
    held_out_report,
)
from sbi_jeffreys.diagnostics.calibration import (
    PairDraws,
    coverage_curve,
    hpd_ranks,
    inside_prior,
    marginal_ranks,
)
from sbi_jeffreys.diagnostics.findings import FindingKind, Statistic
from sbi_jeffreys.diagnostics.verdicts import FAMILYWISE, judge

_BOX = BoxUniform(-torch.ones(2), torch.ones(2))

pytestmark = pytest.mark.filterwarnings("ignore:.*no parameters/buffers")


def report_on(law, num=500, prior=PRIOR, hidden_sign=False, **kwargs) -> HeldOutReport:
    theta, x = pairs(num, prior, hidden_sign)
    return held_out_report(DirectPosterior(Known(law), prior), theta, x, **kwargs)


def kinds(report):
    """What was found."""
    return {finding.kind for finding in report.findings}


# ------------------------------------------------------------------ right ones pass


@pytest.mark.parametrize("num", [50, 500, 4000])
def test_the_exact_posterior_is_healthy(num):
    report = report_on(gaussian(), num)
    assert report.healthy
    assert report.verdict[0].startswith(f"healthy within what {num} pairs can show")
    assert report.leakage == 0.0
    assert report.reverse is None
    assert report.effective_sample_size is None
    entropy = math.log(2 * math.pi * math.e * 0.2)
    assert abs(report.forward - entropy) < 4 * report.forward_error


def test_an_exact_posterior_of_two_modes_is_healthy():
    assert report_on(two_modes(0.5), hidden_sign=True).healthy


def test_a_posterior_that_is_its_uniform_prior_is_healthy():
    # All densities tie: without randomised ranks this would look far too wide.
    theta, x = _BOX.sample((500,)), torch.randn(500, 2)
    main = Known(lambda x: BoxUniform(-torch.ones(len(x), 2), torch.ones(len(x), 2)))
    report = held_out_report(DirectPosterior(main, _BOX), theta, x)
    assert report.healthy, str(report)


@pytest.mark.parametrize("num", [50, 300])
def test_false_alarms_are_as_rare_as_promised(num):
    repeats = 400
    alarms = 0
    for _ in range(repeats):
        ranks, marginals = torch.rand(num), torch.rand(num, 3)
        alarms += bool(judge(ranks, marginals, 0.0, 100))
    assert alarms <= repeats * FAMILYWISE + 3 * math.sqrt(repeats * FAMILYWISE)


def test_ranks_are_uniform_for_any_number_of_draws_also_weighted():
    theta, x = pairs(4000)
    wide, exact = gaussian(1.5)(x), gaussian()(x)
    drawn = wide.sample((30,))
    log_q = exact.log_prob(drawn)
    weighted = PairDraws(drawn, log_q, exact.log_prob(theta), log_q - wide.log_prob(drawn))
    drawn = exact.sample((3,))
    few = PairDraws(drawn, exact.log_prob(drawn), exact.log_prob(theta))
    for draws, tolerance in ((few, 0.025), (weighted, 0.035)):
        inside = torch.ones_like(draws.log_prob, dtype=torch.bool)
        for ranks in (hpd_ranks(draws, inside), marginal_ranks(draws, theta, inside)[:, 1]):
            curve = coverage_curve(ranks, [0.1, 0.5, 0.9])
            assert (curve.values - curve.levels).abs().max() < tolerance


# ------------------------------------------------------------------ wrong ones fail


@pytest.mark.parametrize("num", [100, 500])
def test_too_narrow_is_overconfident(num):
    report = report_on(gaussian(0.6), num)
    assert FindingKind.OVERCONFIDENT in kinds(report)
    assert not kinds(report) & {FindingKind.TOO_WIDE, FindingKind.BIASED, FindingKind.LEAKS}
    k = int((report.coverage.levels - 0.9).abs().argmin())
    assert report.coverage.values[k] < report.coverage.lower[k]


@pytest.mark.parametrize("num", [100, 500])
def test_too_wide_is_called_so(num):
    report = report_on(gaussian(1.6), num)
    assert kinds(report) == {FindingKind.TOO_WIDE}
    k = int((report.coverage.levels - 0.5).abs().argmin())
    assert report.coverage.values[k] > report.coverage.upper[k]


def test_wrong_width_of_one_parameter_that_the_joint_region_hides():
    scale = torch.tensor([0.75, 1.35])
    report = report_on(gaussian(scale), 2000)
    assert not report.healthy
    assert not kinds(report) & {FindingKind.BIASED, FindingKind.LEAKS}


def test_a_shift_is_found_with_its_parameter_and_direction():
    report = report_on(gaussian(shift=(0.0, 0.4)))
    (finding,) = [found for found in report.findings if found.kind is FindingKind.BIASED]
    assert finding.parameters == (1,)
    (measured,) = finding.measurements
    assert measured.statistic is Statistic.MEAN_RANK
    assert measured.value < measured.low < measured.expected  # true θ2 ranks low: draws too high
    assert "θ2 too high" in str(finding)
    report = report_on(gaussian(shift=(-0.4, 0.4)))
    assert "θ1 too low" in str(report)
    assert "θ2 too high" in str(report)


def test_a_wrong_shape_has_both_levels_among_its_measurements():
    # Too many true parameters inside the 50 % region, too few inside the 95 % region.
    ranks = torch.cat([torch.linspace(0, 0.5, 700), torch.linspace(0.96, 1, 300)])
    findings = judge(ranks, torch.linspace(0, 1, 1000).unsqueeze(1), 0.0, 10_000)
    (shape,) = [found for found in findings if found.kind is FindingKind.WRONG_SHAPE]
    assert {m.statistic for m in shape.measurements} == {Statistic.COVERAGE}
    levels = {m.expected: m.value for m in shape.measurements}
    assert levels[0.5] == pytest.approx(0.7)
    assert levels[0.95] == pytest.approx(0.7)


def test_a_verdict_is_made_from_the_findings():
    report = report_on(gaussian(0.6))
    assert report.verdict == [str(finding) for finding in report.findings]
    for finding in report.findings:
        assert str(finding).startswith(finding.kind.value)
        for measured in finding.measurements:
            assert not measured.low <= measured.value <= measured.high
            assert str(measured) in str(report)


@pytest.mark.parametrize("num", [60, 500])
def test_a_missing_mode_shows_as_missed_mass(num):
    report = report_on(two_modes(1.0), num, hidden_sign=True)
    assert FindingKind.MISSES_MASS in kinds(report)
    assert FindingKind.TOO_WIDE not in kinds(report)
    exact = report_on(two_modes(0.5), num, hidden_sign=True)
    assert report.forward > exact.forward + 3 * report.forward_error  # the heavy tail


def test_an_invented_mode_is_calibrated_and_only_the_proxy_finds_it():
    # The posterior of someone who is not told the sign of x: right for what it uses, so no rank
    # can object. This is why the reverse half of the divergence is reported.
    theta, x = pairs(400)
    far = x.norm(dim=1) > 1.5  # the modes are apart
    posterior = DirectPosterior(Known(two_modes(0.5)), PRIOR)
    proxy = GivenProxy(PRIOR, log_likelihood)
    blind = held_out_report(posterior, theta[far], x[far])
    assert blind.healthy
    assert "uses all of x" in blind.verdict[0]
    report = held_out_report(posterior, theta[far], x[far], 1000, proxy)
    assert kinds(report) == {FindingKind.DISAGREES_WITH_PROXY}
    assert report.effective_sample_size == pytest.approx(0.5, abs=0.05)
    assert report.reverse is not None
    assert report.reverse > 3  # the invented mode lies where the proxy has almost no mass


def test_the_prior_as_posterior_is_calibrated_and_the_proxy_finds_it():
    narrow = lambda theta, x: Normal(theta, 0.05).log_prob(x).sum(-1)  # noqa: E731
    theta = PRIOR.sample((300,))
    x = theta + 0.05 * torch.randn_like(theta)
    posterior = DirectPosterior(Known(lambda x: Independent(Normal(0 * x, 1.0), 1)), PRIOR)
    assert held_out_report(posterior, theta, x).healthy
    report = held_out_report(posterior, theta, x, proxy=GivenProxy(PRIOR, narrow))
    assert kinds(report) == {FindingKind.DISAGREES_WITH_PROXY}


def test_a_missing_mode_does_not_lower_the_effective_sample_size_but_raises_the_reverse_kl():
    def likelihood(theta, x):
        return torch.logaddexp(log_likelihood(theta, x), log_likelihood(theta, -x))

    theta, x = pairs(400, hidden_sign=True)
    far = x.norm(dim=1) > 1.8
    report = held_out_report(
        DirectPosterior(Known(two_modes(1.0)), PRIOR),
        theta[far],
        x[far],
        num_samples=1000,
        proxy=GivenProxy(PRIOR, likelihood),
    )
    assert FindingKind.MISSES_MASS in kinds(report)
    assert report.reverse == pytest.approx(math.log(2), abs=0.08)
    assert report.effective_sample_size is not None
    assert report.effective_sample_size > 0.85


def test_leakage_is_found_and_does_not_spoil_the_ranks():
    # The Gaussian cut to the box is the exact posterior under the uniform prior.
    report = report_on(
        lambda x: Independent(Normal(x, NOISE), 1), prior=_BOX, hidden_sign=False, num=1000
    )
    assert kinds(report) == {FindingKind.LEAKS}
    assert 0.2 < report.leakage < 0.8


# ------------------------------------------------------------------ the reverse half


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.7, 0.0), (1.3, 0.5)])
def test_reverse_kl_is_the_one_between_gaussians(scale, shift):
    report = report_on(
        gaussian(scale, shift), proxy=GivenProxy(PRIOR, log_likelihood), num_samples=400
    )
    truth = scale**2 + shift**2 - 1 - 2 * math.log(scale)  # two dimensions, shift in each
    assert report.reverse is not None
    assert report.reverse_error is not None
    assert report.reverse == pytest.approx(truth, abs=4 * report.reverse_error + 0.01)


def test_reverse_kl_is_that_of_the_posterior_cut_to_the_prior():
    proxy = GivenProxy(_BOX, log_likelihood)
    report = report_on(lambda x: Independent(Normal(x, NOISE), 1), prior=_BOX, proxy=proxy)
    assert report.reverse == pytest.approx(0.0, abs=0.03)  # the cut posterior is exact


# ------------------------------------------------------------------ what it takes


def test_the_corrected_posterior_is_judged_by_its_weighted_draws():
    theta, x = pairs(500)
    main, proxy = Known(gaussian(1.5)), GivenProxy(PRIOR, log_likelihood)
    corrected = CorrectedPosterior(main, proxy, PRIOR)
    report = held_out_report(corrected, theta, x, num_samples=400)
    assert report.healthy, str(report)
    entropy = math.log(2 * math.pi * math.e * 0.2)
    assert abs(report.forward - entropy) < 4 * report.forward_error
    assert not held_out_report(DirectPosterior(main, PRIOR), theta, x).healthy


def test_a_corrected_posterior_is_not_blamed_for_its_mains_distance_from_the_proxy():
    theta, x = pairs(500)
    main, proxy = Known(gaussian(2.5)), GivenProxy(PRIOR, log_likelihood)
    report = held_out_report(CorrectedPosterior(main, proxy, PRIOR), theta, x, num_samples=800)
    assert report.reverse is not None
    assert report.reverse > 2  # the main's
    assert report.healthy, str(report)
    raw = held_out_report(DirectPosterior(main, PRIOR), theta, x, proxy=proxy)
    assert FindingKind.DISAGREES_WITH_PROXY in {finding.kind for finding in raw.findings}


def test_ranks_among_a_few_effective_draws_are_no_evidence():
    """Weights of a main two deviations off: the exact posterior was "too wide" 7 times in 8."""
    theta, x = pairs(500)
    proxy = GivenProxy(PRIOR, log_likelihood)
    corrected = CorrectedPosterior(Known(gaussian(1.0, 2.0)), proxy, PRIOR)
    report = held_out_report(corrected, theta, x)
    assert report.effective_draws < 20
    assert report.unreliable
    assert not report.healthy
    assert not report.findings
    assert "raise num_samples to" in report.verdict[-1]
    assert "unreliable" in str(report)


def test_an_ensemble_is_judged_as_the_mixture_it_is():
    theta, x = pairs(500, hidden_sign=True)
    members = [DirectPosterior(Known(two_modes(w)), PRIOR) for w in (1.0, 0.0)]
    assert held_out_report(EnsemblePosterior(members), theta, x).healthy
    assert not held_out_report(EnsemblePosterior(members, [0.95, 0.05]), theta, x).healthy


def test_an_inference_brings_its_proxy_along():
    theta, x = pairs(260)
    options = JeffreysOptions(num_steps=20)
    inference = NPE_Jeffreys(PRIOR, "mdn", show_progress_bars=False, options=options)
    with pytest.raises(RuntimeError, match="call train"):
        held_out_report(inference, theta, x)
    inference.append_simulations(theta[:200], x[:200]).train(max_num_epochs=5)
    report = held_out_report(inference, theta[200:], x[200:], num_samples=50)
    assert report.reverse is not None
    assert math.isfinite(report.reverse)
    assert report.effective_sample_size is not None
    assert 0 < report.effective_sample_size <= 1
    for part in ("60 held-out pairs", "forward NLL", "reverse KL", "nats", "verdict"):
        assert part in str(report)
    posterior = held_out_report(inference.build_posterior(), theta[200:], x[200:], num_samples=50)
    assert posterior.forward == pytest.approx(report.forward, abs=1e-5)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("theta", "x", "message"),
    [
        (torch.zeros(49, 2), torch.zeros(49, 2), "at least 50"),
        (torch.zeros(60, 2), torch.zeros(61, 2), "the same number of rows"),
        (torch.zeros(60), torch.zeros(60, 2), "reshape"),
        (
            torch.zeros(60, 3),
            torch.zeros(60, 2),
            r"theta must be .*\(N, 2\), got shape \(60, 3\)",
        ),
        (
            torch.zeros(60, 2),
            torch.zeros(60, 3),
            r"x must be .*\(N, 2\), got shape \(60, 3\)",
        ),
        (torch.full((60, 2), math.nan), torch.zeros(60, 2), "60 of 60 pairs are not finite"),
        (torch.zeros(60, 2), torch.full((60, 2), math.inf), "drop them"),
        (torch.zeros(60, 2), torch.full((60, 2), math.nan), "drop them"),
    ],
)
def test_bad_pairs_are_refused_with_the_remedy(theta, x, message):
    with pytest.raises(ValueError, match=message):
        held_out_report(DirectPosterior(Known(gaussian()), PRIOR), theta, x)


def test_nan_densities_and_other_kinds_are_refused():
    theta, x = pairs(60)
    broken = DirectPosterior(Known(lambda x: _NanDensity(len(x))), PRIOR)
    with pytest.raises(ValueError, match="density is NaN"):
        held_out_report(broken, theta, x)
    with pytest.raises(ValueError, match="num_samples"):
        held_out_report(broken, theta, x, num_samples=5)
    with pytest.raises(TypeError, match="DirectPosterior"):
        held_out_report(PRIOR, theta, x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(RuntimeError, match="not trained"):
        held_out_report(NPE(PRIOR), theta, x)


class _NanDensity:
    def __init__(self, num):
        self.num = num

    def sample(self, shape):
        return torch.zeros(*shape, self.num, 2)

    def log_prob(self, theta):
        return torch.full(theta.shape[:-1], math.nan)


def test_inside_prior_takes_priors_without_support():
    class Bare:
        def log_prob(self, theta):
            return torch.where(theta.abs().amax(-1) < 1, 0.0, -math.inf)

    theta = torch.tensor([[[0.0, 0.5], [2.0, 0.0]], [[math.nan, 0.0], [0.1, 0.1]]])
    found = inside_prior(Bare(), theta)  # pyright: ignore[reportArgumentType]
    assert found.tolist() == [[True, False], [False, True]]

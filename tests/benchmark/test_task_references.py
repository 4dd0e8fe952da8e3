"""Reference posteriors of the benchmark tasks against independent truth."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import MultivariateNormal

from sbi_jeffreys.benchmark.tasks import TASKS, ReferenceConvergenceError, Task, get_task
from sbi_jeffreys.benchmark.tasks._reference import (
    accept_weighted,
    adaptive_importance_sample,
    effective_sample_size,
    rejection_sample,
)
from sbi_jeffreys.benchmark.tasks._student import StudentMixture
from sbi_jeffreys.benchmark.tasks._truncated import (
    log_interval_probability,
    sample_truncated_normal,
)

# sir and lotka_volterra take a second per observation: they have their own tests below.
CHEAP = [
    "bernoulli_glm",
    "bernoulli_glm_raw",
    "gaussian_linear",
    "gaussian_linear_uniform",
    "gaussian_mixture",
    "slcp",
    "slcp_distractors",
    "two_moons",
]
SBC_TRIALS, SBC_BINS = 60, 5


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted([*CHEAP, "sir", "lotka_volterra"]))
def test_reference_is_inside_the_prior_and_repeats_under_a_seed(name: str):
    task = get_task(name)
    torch.manual_seed(0)
    _, x = task.simulate_joint(1)
    draws = []
    for shape in (x[0], x):
        torch.manual_seed(5)
        draws.append(task.sample_reference(shape, 300))
    assert draws[0].shape == (300, task.dim_theta)
    assert draws[0].dtype == torch.float32
    assert torch.equal(draws[0], draws[1])
    assert len(draws[0].unique(dim=0)) == 300, "rejection must not repeat draws"
    assert torch.isfinite(task.prior.log_prob(draws[0])).all()


def _calibration_p_value(task: Task, shrink: float = 1.0) -> float:
    """Smallest p-value over the dimensions, Bonferroni corrected, of uniform ranks.

    Talts et al. (2018): the rank of θ* among posterior draws for x ∼ p(x|θ*) is uniform.

    Args:
        task: The task.
        shrink: Factor on the draws' spread about their mean; 1 leaves them as they are.
    """
    torch.manual_seed(11)
    ranks = []
    for _ in range(SBC_TRIALS):
        theta, x = task.simulate_joint(1)
        draws = task.sample_reference(x[0], 199)
        draws = draws.mean(0) + shrink * (draws - draws.mean(0))
        ranks.append((draws < theta).sum(0))
    bins = torch.stack(ranks) * SBC_BINS // 200
    smallest = min(
        float(stats.chisquare(torch.bincount(column, minlength=SBC_BINS).numpy()).pvalue)
        for column in bins.T
    )
    return min(1.0, smallest * task.dim_theta)


@pytest.mark.parametrize("name", CHEAP)
def test_reference_is_calibrated(name: str):
    # A seeded test at 0.1 %: eight tasks together alarm falsely once in 125 seeds.
    assert _calibration_p_value(get_task(name)) > 1e-3


def test_calibration_check_notices_overconfidence():
    assert _calibration_p_value(get_task("gaussian_linear"), shrink=0.4) < 1e-3


def _grid_agrees(task: Task, x: Tensor, axes: list[Tensor], draws: Tensor, bins: int) -> None:
    """Compare a histogram of 2-D draws with the likelihood on a grid, bin by bin."""
    grid = torch.cartesian_prod(*axes)
    mass = task.log_posterior_unnormalised(grid, x).double().softmax(0)
    share = mass.reshape(bins, len(axes[0]) // bins, bins, len(axes[1]) // bins).sum((1, 3))
    edges = []
    for axis in axes:
        half = 0.5 * float(axis[1] - axis[0])
        edges.append(torch.linspace(float(axis[0]) - half, float(axis[-1]) + half, bins + 1))
    counts = torch.histogramdd(draws, bins=[e.contiguous() for e in edges]).hist.double()
    assert counts.sum() > 0.999 * len(draws)
    # Five standard deviations of a binomial, plus what the grid's own cells blur.
    error = 5 * torch.sqrt(share * len(draws)) + 5 + 0.02 * share * len(draws)
    assert ((counts - share * len(draws)).abs() < error).all()


def _midpoints(low: float, high: float, count: int) -> Tensor:
    width = (high - low) / count
    return low + width * (torch.arange(count).double() + 0.5)


@pytest.mark.parametrize("theta", [[0.2, 0.1], [0.02, -0.05], [0.9, 0.95], [-0.7, 0.99]])
def test_two_moons_matches_its_likelihood_on_a_grid(theta: list[float]):
    """Among them moons that touch at θ₁ + θ₂ = 0 and moons cut off by the prior's box."""
    task = get_task("two_moons")
    torch.manual_seed(1)
    x = task.simulate(torch.tensor([theta]))[0]
    draws = task.sample_reference(x, 20_000)
    axes = [_midpoints(-1.0, 1.0, 1200)] * 2
    _grid_agrees(task, x.double(), axes, draws, bins=60)


def test_two_moons_has_two_modes_of_equal_mass():
    task = get_task("two_moons")
    torch.manual_seed(0)
    x = task.simulate(torch.tensor([[0.3, 0.2]]))[0]
    modes = task.modes(task.sample_reference(x, 10_000), x)
    assert modes is not None
    assert set(modes.tolist()) == {0, 1}
    assert abs(modes.double().mean() - 0.5) < 5 * 0.5 / math.sqrt(10_000)


def test_two_moons_gives_up_on_an_impossible_observation():
    with pytest.raises(ReferenceConvergenceError, match="two_moons: the acceptance rate"):
        get_task("two_moons").sample_reference(torch.tensor([5.0, 5.0]), 10)


@pytest.mark.parametrize("x", [[0.0, 0.0], [9.95, -9.0], [10.4, 3.0]])
def test_gaussian_mixture_matches_its_likelihood_on_a_grid(x: list[float]):
    task = get_task("gaussian_mixture")
    torch.manual_seed(0)
    observed = torch.tensor(x)
    draws = task.sample_reference(observed, 20_000)
    axes = [_midpoints(max(v - 4.5, -10.0), min(v + 4.5, 10.0), 900) for v in x]
    _grid_agrees(task, observed.double(), axes, draws, bins=30)


def test_gaussian_linear_moments():
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 10)
    draws = get_task("gaussian_linear").sample_reference(x, 20_000)
    assert (draws.mean(0) - 0.5 * x).abs().max() < 5 * math.sqrt(0.05 / 20_000)
    torch.testing.assert_close(draws.T.cov(), 0.05 * torch.eye(10), rtol=0.06, atol=0.003)


def test_gaussian_linear_uniform_moments():
    torch.manual_seed(0)
    x, std = torch.linspace(-2, 2, 10), math.sqrt(0.1)
    draws = get_task("gaussian_linear_uniform").sample_reference(x, 20_000)
    truth = stats.truncnorm((-1 - x.numpy()) / std, (1 - x.numpy()) / std, x.numpy(), std)
    error = 5 * truth.std() / math.sqrt(20_000)
    assert (abs(draws.mean(0).numpy() - truth.mean()) < error).all()
    torch.testing.assert_close(
        draws.std(0).double(), torch.as_tensor(truth.std()), rtol=0.05, atol=0.0
    )


@pytest.mark.parametrize("mean", [-60.0, -8.0, 0.3, 5.0, 45.0])
def test_truncated_normal_is_right_in_the_tails(mean: float):
    torch.manual_seed(0)
    draws = sample_truncated_normal(torch.full((20_000,), mean).double(), 1.0, -1.0, 1.0)
    truth = stats.truncnorm(-1 - mean, 1 - mean, mean, 1.0)
    assert draws.abs().max() <= 1.0
    assert stats.kstest(draws.numpy(), truth.cdf).pvalue > 1e-3
    log_mass = float(
        log_interval_probability(torch.tensor([mean], dtype=torch.float64), 1.0, -1.0, 1.0)
    )
    near, far = stats.norm.logsf(abs(mean) - 1.0), stats.norm.logsf(abs(mean) + 1.0)
    assert log_mass == pytest.approx(near + math.log1p(-math.exp(far - near)), rel=1e-9)


@pytest.mark.parametrize("theta", [[0.5, -0.5, 1.5, -1.3, 0.4], [2.5, 2.8, -1.8, 1.6, -1.5]])
def test_slcp_matches_weighted_prior_draws(theta: list[float]):
    """Plain importance sampling from the prior, which knows nothing of the structure."""
    task = get_task("slcp")
    torch.manual_seed(2)
    x = task.simulate(torch.tensor([theta]))[0]
    draws = task.sample_reference(x, 5_000).double()
    prior = task.prior.sample((1_500_000,))
    log_weights = task.log_likelihood(prior, x).double()
    weights, ess = torch.softmax(log_weights, 0), effective_sample_size(log_weights)
    assert ess > 300, "the check itself must be able to tell"

    def features(th: Tensor) -> Tensor:
        means, scales = th[:, :2], th[:, 2:4].abs()
        return torch.cat((means, scales, th[:, 4:], th[:, :1] * th[:, 1:2], means**2), 1)

    values = features(prior.double())
    truth = weights @ values
    spread = (weights @ (values - truth) ** 2).sqrt()
    error = spread * math.sqrt(1 / ess + 1 / len(draws))
    assert ((features(draws).mean(0) - truth).abs() < 4 * error).all()
    modes = task.modes(draws, x)
    assert modes is not None
    shares = torch.bincount(modes, minlength=4) / len(draws)
    assert (shares - 0.25).abs().max() < 5 * math.sqrt(0.1875 / len(draws))


def test_slcp_reference_copes_with_awkward_observations():
    """Scales near zero, and a mean well outside the prior's box."""
    task = get_task("slcp")
    torch.manual_seed(0)
    theta = torch.tensor([[0.1, 0.2, 0.05, 0.04, 2.5], [2.9, -2.9, 2.9, 2.9, 2.9]])
    far = torch.tensor([7.0, 6.5, 9.0, 8.0, 5.0, 4.0, 8.0, 9.0])
    for x in [*task.simulate(theta), far]:
        assert task.sample_reference(x, 1_000).shape == (1_000, 5)


def _stein_agrees(task: Task, x: Tensor, draws: Tensor, logs: bool, step: float) -> None:
    """E[∇ log p(φ|x)] = 0 and E[∇ log p(φ|x) (φ − m)ᵀ] = −I, by finite differences.

    These identities hold for the posterior and, in general, for nothing else.
    """
    phi = draws.double().log() if logs else draws.double()

    def log_density(values: Tensor) -> Tensor:
        theta = values.exp() if logs else values
        jacobian = values.sum(-1) if logs else 0.0
        return task.log_posterior_unnormalised(theta, x).double() + jacobian

    shifts = step * phi.std(0).diag()
    gradient = torch.stack(
        [(log_density(phi + s) - log_density(phi - s)) / (2 * s.sum()) for s in shifts], -1
    )
    standardised = (phi - phi.mean(0)) / phi.std(0)
    score = gradient * phi.std(0)
    products = score[:, :, None] * standardised[:, None, :]
    root_n = math.sqrt(len(phi))
    assert (score.mean(0).abs() < 4.5 * score.std(0) / root_n).all()
    expected = -torch.eye(phi.shape[1]).double()
    assert ((products.mean(0) - expected).abs() < 4.5 * products.std(0) / root_n).all()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["bernoulli_glm", "bernoulli_glm_raw", "sir", "lotka_volterra"])
def test_reference_satisfies_steins_identities(name: str, seed: int):
    task = get_task(name)
    torch.manual_seed(seed)
    _, x = task.simulate_joint(1)
    draws = task.sample_reference(x[0], 1_500)
    _stein_agrees(task, x[0].double(), draws, name in ("sir", "lotka_volterra"), step=0.01)


def test_steins_identities_notice_overconfidence():
    task = get_task("bernoulli_glm")
    torch.manual_seed(0)
    _, x = task.simulate_joint(1)
    draws = task.sample_reference(x[0], 1_500)
    narrow = draws.mean(0) + 0.8 * (draws - draws.mean(0))
    with pytest.raises(AssertionError):
        _stein_agrees(task, x[0].double(), narrow, False, step=0.01)


def test_sir_matches_a_grid():
    task = get_task("sir")
    torch.manual_seed(4)
    x = task.simulate(torch.tensor([[0.5, 0.12]]))[0]
    log_draws = task.sample_reference(x, 5_000).double().log()
    centre, spread = log_draws.mean(0), log_draws.std(0)
    axes = [_midpoints(float(c - 6 * s), float(c + 6 * s), 90) for c, s in zip(centre, spread)]
    grid = torch.cartesian_prod(*axes)
    log_mass = task.log_posterior_unnormalised(grid.exp(), x.double()).double() + grid.sum(-1)
    mass = log_mass.softmax(0)
    mean = mass @ grid
    covariance = (grid - mean).T @ (mass[:, None] * (grid - mean))
    std = covariance.diagonal().sqrt()
    assert ((log_draws.mean(0) - mean).abs() < 5 * std / math.sqrt(5_000)).all()
    torch.testing.assert_close(log_draws.T.cov(), covariance, rtol=0.1, atol=0.0)


def _normal(dim: int, std: float = 1.0) -> MultivariateNormal:
    zeros = torch.zeros(dim, dtype=torch.float64)
    return MultivariateNormal(zeros, std**2 * torch.eye(dim, dtype=torch.float64))


def test_adaptive_sampler_finds_separate_narrow_modes():
    torch.manual_seed(0)
    modes = torch.tensor([[-1.0, 0.5], [1.0, 1.0]]).double()

    def log_target(z: Tensor) -> Tensor:
        near = -0.5 * ((z[:, None] - modes) / 0.02).square().sum(-1)
        return torch.logsumexp(near + torch.tensor([0.3, 0.7]).log(), -1)

    draws = adaptive_importance_sample(log_target, _normal(2), 4_000, "two_spikes")
    right = draws[:, 0] > 0
    assert abs(right.double().mean() - 0.7) < 5 * math.sqrt(0.21 / 4_000)
    torch.testing.assert_close(draws[right].mean(0), modes[1], atol=0.002, rtol=0.0)
    torch.testing.assert_close(
        draws[right].std(0), torch.full((2,), 0.02).double(), rtol=0.07, atol=0
    )


def test_convergence_check_fails_for_a_proposal_too_narrow():
    """A target ten times as wide as the proposal in four dimensions: a few weights carry all."""
    target, proposal = _normal(4, 10.0), _normal(4)

    def propose(count: int) -> tuple[Tensor, Tensor]:
        draws = proposal.sample(torch.Size((count,)))
        return draws, target.log_prob(draws) - proposal.log_prob(draws)

    torch.manual_seed(0)
    with pytest.raises(ReferenceConvergenceError, match="posterior of narrow: the eff") as error:
        accept_weighted(propose, 1_000, "narrow")
    assert error.value.task == "narrow"
    assert error.value.obtained < error.value.required


def test_convergence_check_fails_for_targets_that_cannot_be_reached():
    torch.manual_seed(0)
    nowhere = lambda z: torch.full((len(z),), -torch.inf, dtype=z.dtype)  # noqa: E731
    with pytest.raises(ReferenceConvergenceError, match="while adapting is 0"):
        adaptive_importance_sample(nowhere, _normal(2), 100, "nowhere")

    def spike(z: Tensor) -> Tensor:
        return -0.5 * ((z - 3.0) / 1e-4).square().sum(-1)

    with pytest.raises(ReferenceConvergenceError, match="after adaptation"):
        adaptive_importance_sample(spike, _normal(4), 100, "spike", max_rounds=2)

    # Weights of a single huge outlier: enough effective draws in number, no yield.
    def outlier(count: int) -> tuple[Tensor, Tensor]:
        log_weights = torch.zeros(count, dtype=torch.float64)
        log_weights[0] = math.log(count)
        return torch.rand(count, 1), log_weights

    with pytest.raises(ReferenceConvergenceError):
        accept_weighted(outlier, 1_000, "outlier", min_efficiency=0.0)
    with pytest.raises(ReferenceConvergenceError, match="acceptance rate"):
        rejection_sample(lambda n: (torch.rand(n, 1), torch.zeros(n).bool()), 10, "never")


def test_student_mixture_density_and_samples_agree():
    torch.manual_seed(0)
    covariance = torch.tensor([[2.0, 0.6], [0.6, 0.5]]).double()
    single = StudentMixture.single(torch.tensor([1.0, -1.0]).double(), covariance, df=7.0)
    points = torch.randn(50, 2).double()
    truth = stats.multivariate_t([1.0, -1.0], covariance.numpy(), df=7).logpdf(points.numpy())
    torch.testing.assert_close(single.log_prob(points), torch.from_numpy(truth))
    draws = single.sample(torch.Size((40_000,)))
    torch.testing.assert_close(draws.T.cov(), covariance * 7 / 5, rtol=0.1, atol=0.02)


def test_every_registered_benchmark_task_is_covered_here():
    covered = {*CHEAP, "sir", "lotka_volterra"}
    assert {n for n, cls in TASKS.items() if "tuning" not in cls.__module__} <= covered

"""Benchmark tasks: interface, registry, and simulators and likelihoods against known truth.

The reference posteriors are tested in `test_task_references.py`.
"""

import math

import numpy as np
import pytest
import torch
from sbi.utils import BoxUniform, mcmc_transform
from sbi.utils.user_input_checks import process_prior
from scipy import stats
from scipy.integrate import solve_ivp
from torch.distributions import LogNormal, MultivariateNormal

from sbi_jeffreys.benchmark.tasks import TASKS, Task, get_task, register_task
from sbi_jeffreys.benchmark.tasks import lotka_volterra as lv
from sbi_jeffreys.benchmark.tasks import sir as sir_module
from sbi_jeffreys.benchmark.tasks import slcp as slcp_module
from sbi_jeffreys.benchmark.tasks._ode import rk4
from sbi_jeffreys.benchmark.tasks.bernoulli_glm import design_matrix
from sbi_jeffreys.benchmark.tasks.tuning import TUNING_TASKS, TuningTask

# Name: (parameters, outputs), from Lueckmann et al. (2021), supplement T.
DIMENSIONS = {
    "bernoulli_glm": (10, 10),
    "bernoulli_glm_raw": (10, 100),
    "gaussian_linear": (10, 10),
    "gaussian_linear_uniform": (10, 10),
    "gaussian_mixture": (2, 2),
    "lotka_volterra": (4, 20),
    "sir": (2, 10),
    "slcp": (5, 8),
    "slcp_distractors": (5, 100),
    "two_moons": (2, 2),
}


@pytest.fixture(params=sorted(DIMENSIONS))
def task(request: pytest.FixtureRequest) -> Task:
    torch.manual_seed(0)
    return get_task(request.param)


def test_shapes_and_dtypes(task: Task):
    dim_theta, dim_x = DIMENSIONS[task.name]
    theta, x = task.simulate_joint(7)
    assert (task.dim_theta, task.dim_x) == (dim_theta, dim_x)
    assert task.prior.event_shape == (dim_theta,)
    assert theta.shape == (7, dim_theta)
    assert x.shape == (7, dim_x)
    assert theta.dtype == x.dtype == torch.float32
    assert task.simulate(theta[:1]).shape == (1, dim_x)
    assert torch.isfinite(x).all()


def test_log_likelihood_is_finite_and_broadcasts(task: Task):
    theta, x = task.simulate_joint(6)
    paired = task.log_likelihood(theta, x)
    assert paired.shape == (6,)
    assert paired.dtype == torch.float32
    assert torch.isfinite(paired).all()
    table = task.log_likelihood(theta[:, None], x[None])
    assert table.shape == (6, 6)
    torch.testing.assert_close(table.diagonal(), paired)
    torch.testing.assert_close(task.log_likelihood(theta, x[0]), table[:, 0])
    torch.testing.assert_close(task.log_likelihood(theta[0], x), table[0])


def test_simulations_repeat_under_a_seed(task: Task):
    theta = task.prior.sample((5,))
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(task.simulate(theta))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_sbi_accepts_the_prior(task: Task):
    prior, num_params, _ = process_prior(task.prior)
    transform = mcmc_transform(prior)
    theta = prior.sample((20,))
    assert num_params == task.dim_theta
    assert prior.support.check(theta).all()
    torch.testing.assert_close(transform.inv(transform(theta)), theta, atol=1e-4, rtol=1e-3)


def test_log_posterior_vanishes_outside_the_prior(task: Task):
    theta, x = task.simulate_joint(3)
    inside = task.log_posterior_unnormalised(theta, x)
    torch.testing.assert_close(inside, task.prior.log_prob(theta) + task.log_likelihood(theta, x))
    if task.name not in ("gaussian_linear", "bernoulli_glm", "bernoulli_glm_raw"):
        assert (task.log_posterior_unnormalised(theta - 100.0, x) == -torch.inf).all()


def test_simulator_and_likelihood_agree(task: Task):
    """E over x ∼ p(x|θ) of p(x|θ')/p(x|θ) is 1 for every θ'."""
    if task.name == "two_moons":
        pytest.skip("its noise has sharp edges: see the test on a grid")
    theta = task.prior.sample((2_000,))
    # Small steps keep the ratio's variance finite; each direction has its own sign.
    step = {
        "gaussian_mixture": 0.005,
        "lotka_volterra": 0.0003,
        "sir": 0.003,
        "slcp": 0.01,
        "slcp_distractors": 0.01,
    }
    signs = torch.randint(0, 2, theta.shape) * 2.0 - 1.0
    other = theta * (1 + step.get(task.name, 0.05) * signs)
    x = task.simulate(theta)
    log_ratio = task.log_likelihood(other.double(), x) - task.log_likelihood(theta.double(), x)
    ratio = log_ratio.exp()
    if task.name.startswith("slcp"):
        # Where a scale is nearly 0, the step in the mean is large against it.
        ratio = ratio[(theta[:, 2:4].abs() > 0.5).all(1)]
    error = ratio.std() / math.sqrt(len(ratio))
    assert abs(ratio.mean() - 1.0) < 4 * error
    assert 1e-4 < error < 0.05, "too tight or too loose a check to mean anything"


def test_two_moons_likelihood_normalises_and_matches_the_simulator():
    task = get_task("two_moons")
    torch.manual_seed(0)
    theta = torch.tensor([0.3, -0.1])
    x = task.simulate(theta.expand(20_000, 2))
    low, high = x.min(0).values - 0.01, x.max(0).values + 0.01
    axes = [torch.linspace(float(a), float(b), 800).double() for a, b in zip(low, high)]
    grid = torch.cartesian_prod(*axes)
    density = task.log_likelihood(theta.double(), grid).exp()
    cell = float((axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0]))
    assert float(density.sum() * cell) == pytest.approx(1.0, abs=5e-3)
    mean = (density[:, None] * grid).sum(0) / density.sum()
    std = ((density[:, None] * (grid - mean) ** 2).sum(0) / density.sum()).sqrt()
    assert (x.mean(0) - mean).abs().lt(4 * std / math.sqrt(20_000) + 1e-4).all()
    torch.testing.assert_close(x.std(0).double(), std, rtol=0.02, atol=0.0)


def test_gaussian_likelihoods_are_those_of_torch():
    torch.manual_seed(0)
    for name in ("gaussian_linear", "gaussian_linear_uniform"):
        task = get_task(name)
        theta, x = task.simulate_joint(5)
        truth = MultivariateNormal(theta, 0.1 * torch.eye(10)).log_prob(x)
        torch.testing.assert_close(task.log_likelihood(theta, x), truth, rtol=1e-4, atol=1e-4)
    noise = task.simulate(torch.zeros(20_000, 10))
    torch.testing.assert_close(noise.var(0), torch.full((10,), 0.1), rtol=0.05, atol=0.0)


def test_gaussian_mixture_normalises():
    task = get_task("gaussian_mixture")
    axis = torch.linspace(-7, 7, 1401).double()
    grid = torch.cartesian_prod(axis, axis)
    density = task.log_likelihood(torch.zeros(2).double(), grid).exp()
    assert float(density.sum() * 0.01**2) == pytest.approx(1.0, abs=1e-4)


def test_slcp_likelihood_is_that_of_four_gaussian_points():
    task = get_task("slcp")
    torch.manual_seed(0)
    theta, x = task.simulate_joint(20)
    th = theta.double()
    s_1, s_2, rho = th[:, 2] ** 2, th[:, 3] ** 2, torch.tanh(th[:, 4])
    covariance = torch.stack((s_1**2, rho * s_1 * s_2, rho * s_1 * s_2, s_2**2), -1)
    covariance = covariance.reshape(-1, 1, 2, 2) + 1e-6 * torch.eye(2)
    gaussian = MultivariateNormal(th[:, None, :2], covariance)
    truth = gaussian.log_prob(x.double().reshape(-1, 4, 2)).sum(-1)
    torch.testing.assert_close(task.log_likelihood(th, x), truth)
    flipped = th * torch.tensor([1, 1, -1, 1, 1])
    torch.testing.assert_close(task.log_likelihood(flipped, x), truth)


def test_slcp_distractors_hide_slcp():
    slcp, hidden = get_task("slcp"), get_task("slcp_distractors")
    theta = slcp.prior.sample((5,))
    torch.manual_seed(3)
    hidden_x = hidden.simulate(theta)
    permutation = slcp_module._distractors()[2]
    assert sorted(permutation.tolist()) == list(range(100))
    unpermuted = torch.empty_like(hidden_x)
    unpermuted[:, permutation] = hidden_x
    torch.testing.assert_close(
        hidden.log_likelihood(theta.double(), hidden_x),
        slcp.log_likelihood(theta.double(), unpermuted[:, :8]),
    )
    # Moving a distractor changes nothing, moving an informative output does.
    for position, same in ((20, True), (3, False)):
        moved = unpermuted.clone()
        moved[:, position] += 1.0
        values = hidden.log_likelihood(theta, moved[:, permutation])
        assert torch.equal(values, hidden.log_likelihood(theta, hidden_x)) == same


@pytest.mark.parametrize("dim", [0, 45, 91])
def test_slcp_distractors_follow_the_t_mixture(dim: int):
    """Each coordinate is a mixture of 20 univariate t distributions."""
    torch.manual_seed(0)
    locs, scales, _ = slcp_module._distractors()
    draws = slcp_module._sample_distractors(5_000)[:, dim].numpy()
    loc, scale = locs[:, dim].numpy(), scales[:, dim].norm(dim=-1).numpy()

    def cdf(value: np.ndarray) -> np.ndarray:
        return stats.t(2, loc, scale).cdf(value[:, None]).mean(-1)

    assert stats.kstest(draws, cdf).pvalue > 1e-3


def test_bernoulli_glm_statistics_carry_the_raw_likelihood():
    glm, raw = get_task("bernoulli_glm"), get_task("bernoulli_glm_raw")
    theta = glm.prior.sample((10,))
    torch.manual_seed(3)
    statistics = glm.simulate(theta)
    torch.manual_seed(3)
    spikes = raw.simulate(theta)
    assert set(spikes.unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(statistics.double(), spikes.double() @ design_matrix())
    logits = theta.double() @ design_matrix().T
    truth = torch.distributions.Bernoulli(logits=logits).log_prob(spikes.double()).sum(-1)
    torch.testing.assert_close(raw.log_likelihood(theta.double(), spikes), truth)
    torch.testing.assert_close(
        glm.log_likelihood(theta.double(), statistics), truth, rtol=1e-4, atol=1e-3
    )
    # The filter is causal: lag j of bin t is the stimulus of bin t − j, and nothing before it.
    assert torch.equal(design_matrix()[5:, 6], design_matrix()[:-5, 1])
    assert (design_matrix()[:5, 6] == 0).all()


def test_bernoulli_glm_prior_penalises_roughness():
    prior = get_task("bernoulli_glm").prior
    precision = torch.linalg.inv(prior.covariance_matrix.double())
    first = np.eye(9) - np.eye(9, k=-1)
    penalty = first @ first + np.diag(np.sqrt(np.arange(9) / 9))
    expected = np.zeros((10, 10))
    expected[0, 0], expected[1:, 1:] = 0.5, penalty.T @ penalty
    torch.testing.assert_close(precision, torch.from_numpy(expected), rtol=1e-2, atol=1e-2)


def test_rk4_converges_at_fourth_order():
    start = torch.ones(1, 1, dtype=torch.float64)
    errors = [
        abs(float(rk4(lambda y: -y, start, 1.0, 3, steps)[-1]) - math.exp(-2.0)) for steps in (4, 8)
    ]
    assert 12 < errors[0] / errors[1] < 20


@pytest.mark.parametrize("name", ["sir", "lotka_volterra"])
def test_ode_matches_scipy(name: str):
    torch.manual_seed(0)
    theta = get_task(name).prior.sample((4_000,)).double()
    # Twelve ordinary draws, and the tails: those that move fastest or slowest.
    order = theta.prod(1).argsort()
    theta = torch.cat((theta[:12], theta[order[:3]], theta[order[-3:]]))
    solve = _scipy_sir if name == "sir" else _scipy_lotka_volterra
    truth = np.stack([solve(row) for row in theta.numpy()])
    ours = (
        sir_module.log_infected_share(theta) if name == "sir" else lv.log_populations(theta)
    ).numpy()
    assert np.abs(np.expm1(ours - truth)).max() < 1e-4
    # A row does not depend on the batch it is integrated in.
    alone = (sir_module.log_infected_share if name == "sir" else lv.log_populations)(theta[5:6])
    np.testing.assert_array_equal(alone[0].numpy(), ours[5])


def _scipy_sir(p: np.ndarray) -> np.ndarray:
    """log I/N at days 0, 17, ..., 153."""

    def field(t: float, y: np.ndarray) -> list[float]:
        return [-p[0] * y[0] * y[1], p[0] * y[0] * y[1] - p[1] * y[1]]

    times = 17.0 * np.arange(10)
    start = [1 - 1e-6, 1e-6]
    solution = solve_ivp(
        field, (0, 153), start, method="DOP853", t_eval=times, rtol=1e-9, atol=1e-18
    )
    return np.log(solution.y[1])


def _scipy_lotka_volterra(p: np.ndarray) -> np.ndarray:
    """log populations at days 0, 2.1, ..., 18.9."""

    def field(t: float, y: np.ndarray) -> list[float]:
        return [p[0] * y[0] - p[1] * y[0] * y[1], -p[2] * y[1] + p[3] * y[0] * y[1]]

    times = 2.1 * np.arange(10)
    solution = solve_ivp(
        field, (0, 18.91), [30.0, 1.0], method="DOP853", t_eval=times, rtol=1e-9, atol=1e-18
    )
    return np.log(solution.y)


def test_ode_likelihoods_are_those_of_their_noise():
    torch.manual_seed(0)
    sir, lotka_volterra = get_task("sir"), get_task("lotka_volterra")
    theta, x = sir.simulate_joint(5)
    share = sir_module.log_infected_share(theta).exp().numpy()
    truth = stats.binom(1000, share).logpmf(x.numpy()).sum(-1)
    np.testing.assert_allclose(sir.log_likelihood(theta.double(), x).numpy(), truth, rtol=1e-6)
    theta, x = lotka_volterra.simulate_joint(5)
    truth = LogNormal(lv.log_populations(theta).flatten(1), 0.1).log_prob(x.double()).sum(-1)
    torch.testing.assert_close(lotka_volterra.log_likelihood(theta.double(), x), truth)
    assert lotka_volterra.log_likelihood(theta, -x).eq(-torch.inf).all()


def test_extreme_parameters_simulate_to_finite_values():
    torch.manual_seed(0)
    for name, dim in (("sir", 2), ("lotka_volterra", 4)):
        task = get_task(name)
        # Five standard deviations out in every direction of log θ.
        corners = torch.cartesian_prod(*[torch.tensor([-5.0, 5.0])] * dim)
        base = task.prior.base_dist
        theta = (base.loc + base.scale * corners).exp()
        assert torch.isfinite(task.simulate(theta)).all()


def test_observations_that_do_not_fit_are_refused():
    task = get_task("slcp")
    with pytest.raises(ValueError, match=r"x: expected one observation of slcp, shape \(8,\)"):
        task.sample_reference(torch.zeros(2, 8), 10)
    with pytest.raises(ValueError, match="expected finite values"):
        task.sample_reference(torch.full((8,), torch.nan), 10)


def test_registry_knows_the_ten_and_names_them_when_asked_for_another():
    assert set(DIMENSIONS) <= set(TASKS)
    with pytest.raises(ValueError, match=r"name: expected one of absorption_line, .*'two_suns'"):
        get_task("two_suns")


def test_user_registers_her_own_task():
    class Shift(Task):
        name = "shift_for_test"
        dim_theta = dim_x = 1

        def __init__(self) -> None:
            self.prior = BoxUniform(torch.zeros(1), torch.ones(1))

        def simulate(self, theta):
            return theta + torch.randn_like(theta)

        def log_likelihood(self, theta, x):
            return torch.distributions.Normal(theta, 1.0).log_prob(x).sum(-1)

        def sample_reference(self, x, num_samples):
            return torch.zeros(num_samples, 1)

    try:
        assert register_task(Shift) is Shift
        assert isinstance(get_task("shift_for_test"), Shift)
        register_task(Shift)  # the same class again, as from a notebook cell run twice

        class Other(Shift):
            pass

        with pytest.raises(ValueError, match="expected a new task name"):
            register_task(Other)
    finally:
        TASKS.pop("shift_for_test", None)


def test_a_task_without_a_name_is_refused():
    class Nameless(get_task("sir").__class__):
        name = ""

    with pytest.raises(ValueError, match="non-empty `name`"):
        register_task(Nameless)


@pytest.mark.parametrize("name", sorted(TUNING_TASKS))
def test_a_tuning_task_has_a_simulator_and_a_likelihood_and_needs_no_reference(name: str):
    task = TUNING_TASKS[name]
    theta, x = task.simulate_joint(5)
    assert (theta.shape, x.shape) == ((5, task.dim_theta), (5, task.dim_x))
    assert task.log_likelihood(theta[:, None], x).shape == (5, 5)
    assert torch.isfinite(task.log_likelihood(theta, x)).all()
    if isinstance(task, TuningTask):
        with pytest.raises(NotImplementedError, match=name):
            task.sample_reference(x[0], 10)

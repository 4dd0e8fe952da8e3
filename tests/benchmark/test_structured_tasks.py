"""The image and the set of trials: likelihood against simulator, references against the truth."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from sbi_jeffreys.benchmark.evaluation import EvaluationSettings, evaluate, simulations_for
from sbi_jeffreys.benchmark.methods import FitContext, get_method
from sbi_jeffreys.benchmark.tasks import TASKS, get_task
from sbi_jeffreys.benchmark.tasks.structured import (
    STRUCTURED_TASKS,
    BlurredSource,
    IIDTrials,
    StructuredTask,
)

SHAPES = {"blurred_source": (4, (32, 32)), "iid_trials": (3, (20, 2))}


@pytest.fixture(params=sorted(SHAPES))
def task(request: pytest.FixtureRequest) -> StructuredTask:
    return STRUCTURED_TASKS[request.param]()


def test_shapes_and_embedding(task: StructuredTask):
    dim_theta, x_shape = SHAPES[task.name]
    theta, x = task.simulate_joint(7)
    assert theta.shape == (7, dim_theta)
    assert x.shape == (7, *x_shape)
    assert x.dtype == torch.float32
    assert (task.dim_theta, task.x_shape, task.dim_x) == (dim_theta, x_shape, math.prod(x_shape))
    summary = task.embedding_net()(x)
    assert summary.shape[0] == 7
    assert summary.ndim == 2
    assert task.name not in TASKS  # which promises vector-valued x
    assert type(get_task(task.name)) is type(task)


def test_likelihood_broadcasts_and_vanishes_outside_the_box(task: StructuredTask):
    theta, x = task.simulate_joint(6)
    paired = task.log_likelihood(theta, x)
    table = task.log_likelihood(theta[:, None], x[None])
    assert paired.shape == (6,)
    assert table.shape == (6, 6)
    torch.testing.assert_close(table.diagonal(), paired)
    outside = theta + 100
    if task.name == "blurred_source":
        assert (task.log_posterior_unnormalised(outside, x) == -torch.inf).all()


def test_score_has_mean_zero_at_the_true_parameters(task: StructuredTask):
    """E_x[∇_θ log p(x|θ)] = 0 only if simulator and likelihood agree; Fisher's identity besides."""
    num = 4_000
    theta = task.prior.sample((1,)).double().expand(num, -1).clone().requires_grad_(True)
    x = task.simulate(theta.detach())
    score = torch.autograd.grad(task.log_likelihood(theta, x).sum(), theta)[0]
    error = score.std(dim=0) / math.sqrt(num)
    assert (score.mean(dim=0).abs() < 4 * error).all()
    assert (error > 0).all()


def test_image_likelihood_equals_the_sum_over_pixels():
    task = BlurredSource()
    theta, x = task.simulate_joint(3)
    grid = torch.linspace(-1, 1, 32)
    first, second = torch.meshgrid(grid, grid, indexing="ij")
    for t, image, value in zip(theta, x, task.log_likelihood(theta, x)):
        squared = (first - t[0]) ** 2 + (second - t[1]) ** 2
        mean = torch.exp(t[3] - 0.5 * squared / torch.exp(2 * t[2]))
        expected = Normal(mean, task.noise).log_prob(image).sum()
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-2)


def test_trials_moments_and_density():
    task = IIDTrials()
    theta = torch.tensor([[0.3, -1.0, math.log(0.5)]])
    x = task.simulate(theta.expand(20_000, 3))
    y = torch.stack((x[..., 0].log(), x[..., 1]), dim=-1).reshape(-1, 2)
    torch.testing.assert_close(y.mean(0), theta[0, :2], atol=0.01, rtol=0)
    covariance = 0.25 * torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    torch.testing.assert_close(torch.cov(y.T), covariance, atol=0.01, rtol=0)
    gaussian = MultivariateNormal(theta[0, :2], covariance)
    trials = torch.stack((x[0, :, 0].log(), x[0, :, 1]), dim=-1)
    expected = (gaussian.log_prob(trials) - x[0, :, 0].log()).sum()
    torch.testing.assert_close(task.log_likelihood(theta, x[:1])[0], expected)
    x[0, 0, 0] = -1.0
    assert task.log_likelihood(theta, x[:1])[0] == -torch.inf
    order = torch.randperm(20)
    torch.testing.assert_close(
        task.log_likelihood(theta, x[1:2, order]), task.log_likelihood(theta, x[1:2])
    )


@pytest.mark.slow
def test_references_are_calibrated(task: StructuredTask):
    """Ranks of true parameters among reference draws are uniform (Talts et al. 2018)."""
    num_observations, num_draws = 30, 200
    theta, x = task.simulate_joint(num_observations)
    ranks = torch.stack(
        [(task.sample_reference(o, num_draws) < t).float().mean(0) for t, o in zip(theta, x)]
    )
    # Mean ½ ± 4 standard errors, and a variance of 1/12 within what 30 draws allow.
    assert ((ranks.mean(0) - 0.5).abs() < 4 * math.sqrt(1 / 12 / num_observations)).all()
    assert ((ranks.var(0) > 0.04) & (ranks.var(0) < 0.14)).all()


def test_reference_of_trials_agrees_with_the_half_conjugate_posterior():
    """Given ς, the mean is conjugate; ς itself is integrated on a grid."""
    task = IIDTrials()
    _, x = task.simulate_joint(1)
    draws = task.sample_reference(x, 4_000).double()
    y_mean = torch.stack((x[0, :, 0].log(), x[0, :, 1]), dim=-1).double().mean(0)
    shape = torch.tensor([[1.0, 0.5], [0.5, 1.0]]).double()
    grid = torch.linspace(-2.5, 1.5, 2_001).double()
    precision = 20 * torch.linalg.inv(shape) * torch.exp(-2 * grid)[:, None, None]
    covariance = torch.linalg.inv(torch.eye(2).double() + precision)
    mean = (covariance @ (precision @ y_mean)[..., None]).squeeze(-1)
    at_mode = torch.cat((mean, grid[:, None]), dim=1)
    conditional = MultivariateNormal(mean, covariance).log_prob(mean)
    log_prior = Normal(torch.zeros(2).double(), 1.0).log_prob(mean).sum(1)
    log_prior = log_prior - 0.5 * ((grid + 0.5) / 0.4) ** 2
    log_marginal = log_prior + task.log_likelihood(at_mode, x.double()) - conditional
    weights = torch.softmax(log_marginal, dim=0)
    scale_mean = weights @ grid
    scale_std = (weights @ (grid - scale_mean) ** 2).sqrt()
    tolerance = 4 / math.sqrt(4_000)
    assert (draws[:, 2].mean() - scale_mean).abs() < tolerance * scale_std
    torch.testing.assert_close(draws[:, 2].std(), scale_std, rtol=0.08, atol=0)
    expected = weights @ mean
    assert ((draws[:, :2].mean(0) - expected).abs() < tolerance * draws[:, :2].std(0)).all()


def test_observations_are_checked(task: StructuredTask):
    _, x = task.simulate_joint(2)
    with pytest.raises(ValueError, match="pass one row of `simulate` at a time"):
        task.sample_reference(x, 10)
    x[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="got 1 NaN or inf"):
        task.sample_reference(x[0], 10)


def test_the_benchmark_runs_structured_tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("SBI_JEFFREYS_CACHE", str(tmp_path / "cache"))
    task = get_task("iid_trials")
    settings = EvaluationSettings(observations=1).smoke()
    theta, x = simulations_for(task, 100, seed=0)
    fitted = get_method("npe_jeffreys").fit(task, theta, x, 0, FitContext(fast=True))
    note = fitted.info["proxy"][-1]
    assert "energy" in note
    assert "shape" in note
    result = evaluate(task, fitted, settings, seed=0)
    assert 0.4 < result.metrics["c2st"] <= 1
    assert result.metrics["leakage"] < 0.5
    assert math.isfinite(result.metrics["jeffreys"])

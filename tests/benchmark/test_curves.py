"""Curves: the likelihood is that of white noise about the signal, and references follow it."""

import pytest
import torch
from torch.distributions import Normal

from sbi_jeffreys.benchmark.tasks import get_task
from sbi_jeffreys.benchmark.tasks.curves import CURVE_TASKS, TuneTrace


@pytest.mark.parametrize("name", sorted(CURVE_TASKS))
def test_likelihood_and_noise(name):
    torch.manual_seed(0)
    task = get_task(name)
    theta, x = task.simulate_joint(50)
    assert x.shape == (50, task.dim_x)
    assert theta.shape == (50, task.dim_theta)
    signal, std = task.signal(theta), task.log_noise(theta).exp().unsqueeze(-1)  # type: ignore
    expected = Normal(signal, std).log_prob(x).sum(-1)
    assert torch.allclose(task.log_likelihood(theta, x), expected, rtol=1e-4, atol=0.01)
    assert float(((x - signal) / std).std()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("name", ["absorption_line", "damped_wave"])
def test_references_fit_the_data_as_well_as_the_posterior_has_it(name):
    """At posterior draws 2 (max log ℓ − log ℓ) is on average about D, by Laplace."""
    torch.manual_seed(1)
    task = get_task(name)
    theta = task.prior.mean.unsqueeze(0) + 0.1
    x = task.simulate(theta)
    draws = task.sample_reference(x[0], 1_000)
    assert bool(task.prior.support.check(draws).all())  # type: ignore[union-attr]
    log_likelihood = task.log_likelihood(draws, x)
    loss = 2 * (log_likelihood.max() - log_likelihood).mean()
    assert 0.5 * task.dim_theta < float(loss) < 1.5 * task.dim_theta
    z = (theta[0] - draws.mean(0)) / draws.std(0)
    assert float(z.abs().max()) < 4.5  # five parameters: once in thirty thousand


def test_the_tuning_trace_is_flat_before_its_onset():
    task = TuneTrace()
    assert float(task.signal(task.prior.sample((20,)))[:, :10].abs().max()) == 0.0

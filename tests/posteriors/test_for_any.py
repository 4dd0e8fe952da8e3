"""Posteriors of priors without a bijection, and of x in which trials are missing."""

import pickle

import pytest
import torch
from contract_tools import fresh, train
from sbi.utils import BoxUniform
from torch import nn
from torch.distributions import Distribution, constraints

from sbi_jeffreys import MainBuilder, misspecification_test

BOX = BoxUniform(-torch.ones(2), torch.ones(2))


class _InTriangle(constraints.Constraint):
    event_dim = 1

    def check(self, value):
        return (value >= 0).all(-1) & (value.sum(-1) <= 1)


class Triangle(Distribution):
    """Uniform over θ_1 + θ_2 ≤ 1, θ ≥ 0, to which torch has no bijection."""

    arg_constraints: dict = {}  # noqa: RUF012 - torch's protocol
    support = _InTriangle()
    mean = torch.full((2,), 1 / 3)
    variance = torch.full((2,), 1 / 18)

    def __init__(self):
        super().__init__(event_shape=torch.Size((2,)), validate_args=False)

    def sample(self, sample_shape=torch.Size()):
        u = torch.rand(*sample_shape, 2)
        return torch.where(u.sum(-1, keepdim=True) > 1, 1 - u, u)

    def log_prob(self, value):
        return torch.where(self.support.check(value), torch.tensor(2.0).log(), -torch.inf)


def test_a_prior_without_a_bijection_has_every_posterior():
    torch.manual_seed(0)
    inference, theta = fresh(prior=Triangle()), Triangle().sample((100,))
    inference.append_simulations(theta, theta + 0.1 * torch.randn_like(theta))
    train(inference)
    x_o = torch.tensor([[0.2, 0.3]])
    posteriors = (
        inference.build_posterior(),
        inference.build_corrected_posterior(num_candidates=200),
        inference.focus(x_o, num_steps=2),
        inference.build_proxy_posterior("rejection"),
    )
    for posterior in posteriors:
        drawn = posterior.sample((20,), x=x_o, show_progress_bars=False)
        assert bool(Triangle.support.check(drawn).all())
        pickle.loads(pickle.dumps(posterior))
    for posterior in posteriors[:2]:
        best = posterior.set_default_x(x_o).map(num_iter=5, show_progress_bars=False)
        assert best.shape[-1] == 2
    with pytest.raises(NotImplementedError):  # it walks in the space that a bijection leads to
        inference.build_posterior(sample_with="mcmc")


class _MeanOfTrials(nn.Module):
    """The mean over the trials that are there, which masks NaN, or over all of them."""

    def __init__(self, masks: bool):
        super().__init__()
        self.masks = masks

    def forward(self, x):
        return x.nanmean(1) if self.masks else x.mean(1)


def _trials(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    theta = BOX.sample((num,))
    x = theta.unsqueeze(1) + 0.5 * torch.randn(num, 4, 2)
    x[::2, 3:] = torch.nan  # three trials of every second participant
    return theta, x


@pytest.fixture(scope="module")
def with_missing_trials():
    torch.manual_seed(0)
    inference = fresh(MainBuilder("maf", embedding_net=_MeanOfTrials(True)))
    inference.append_simulations(*_trials(250), exclude_invalid_x=False)
    train(inference)
    return inference


def test_missing_trials_have_a_corrected_posterior(with_missing_trials):
    _, x = _trials(3)
    posterior = with_missing_trials.build_corrected_posterior(num_candidates=200)
    theta = torch.zeros(1, 2)
    assert bool(torch.isfinite(posterior.log_prob(theta, x=x[0])).all())
    assert bool(torch.isfinite(posterior.log_prob_batched(theta.expand(1, 3, 2), x=x)).all())
    assert bool(torch.isfinite(posterior.sample((5,), x=x[0], show_progress_bars=False)).all())
    drawn = posterior.sample_batched((5,), x=x, show_progress_bars=False)
    assert bool(torch.isfinite(drawn).all())


def test_missing_trials_can_be_tested_for_misspecification(with_missing_trials):
    _, x = _trials(2)
    values = misspecification_test(with_missing_trials, torch.cat([x, x + 50])).p_values
    assert float(values[:2].min()) > 0.01
    assert float(values[2:].max()) < 0.1


def test_missing_trials_that_no_net_masks_are_refused(with_missing_trials):
    _, x = _trials(2)
    posterior = with_missing_trials.build_corrected_posterior(num_candidates=200)
    for module in posterior.posterior_estimator.modules():
        if isinstance(module, _MeanOfTrials):
            module.masks = False
    with pytest.raises(ValueError, match=r"finite summaries, got NaN or inf for 1 of 1.*masks"):
        posterior.sample((5,), x=x[0], show_progress_bars=False)
    with pytest.raises(ValueError, match="x must be finite"):  # nothing is left of it
        posterior.sample((5,), x=x[0] * torch.nan, show_progress_bars=False)
    with pytest.raises(ValueError, match="x must be finite"):
        posterior.sample_batched((5,), x=x * torch.inf, show_progress_bars=False)

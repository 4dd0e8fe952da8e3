"""Posteriors, diagnostics, trackers and plots of sbi, on what NPE_Jeffreys trains."""

import copy
import math
import pickle
import warnings
from dataclasses import replace

import matplotlib as mpl
import pytest
import sbi.inference
import torch
from contract_tools import PRIOR, TINY, X_O, fresh, simulate, simulator, train, trained
from sbi.analysis import pairplot, plot_summary
from sbi.diagnostics import check_sbc, run_sbc, run_tarp
from sbi.diagnostics.misspecification import calc_misspecification_mmd
from sbi.diagnostics.tarp import check_tarp
from sbi.inference.posteriors import EnsemblePosterior
from sbi.inference.posteriors.posterior_parameters import (
    DirectPosteriorParameters,
    ImportanceSamplingPosteriorParameters,
    MCMCPosteriorParameters,
    RejectionPosteriorParameters,
    VIPosteriorParameters,
)
from sbi.neural_nets import posterior_nn
from sbi.neural_nets.embedding_nets import FCEmbedding
from sbi.utils.tracking import TensorBoardTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from sbi_jeffreys import NPE_Jeffreys, register

mpl.use("Agg")
QUICK_MCMC = MCMCPosteriorParameters(
    num_chains=3,
    warmup_steps=3,
    thin=1,
    init_strategy_parameters={"num_candidate_samples": 50},
)
QUICK_REJECTION = RejectionPosteriorParameters(num_samples_to_find_max=100, num_iter_to_find_max=3)


@pytest.fixture(scope="module")
def inference() -> NPE_Jeffreys:
    torch.manual_seed(3)
    options = replace(TINY, num_steps=40, steps_per_epoch=20)
    return trained("nsf", options, num=300, max_num_epochs=30)


def quiet_sample(posterior, num: int = 12, **kwargs) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return posterior.sample((num,), x=X_O, **kwargs)


# ---------------------------------------------------------------------- build_posterior


@pytest.mark.parametrize(
    ("sample_with", "parameters"),
    [
        ("direct", DirectPosteriorParameters()),
        pytest.param("mcmc", QUICK_MCMC, marks=pytest.mark.slow),  # sbi's own tests have it, too
        ("rejection", QUICK_REJECTION),
        ("importance", ImportanceSamplingPosteriorParameters(oversampling_factor=4)),
    ],
)
def test_sample_with(inference, sample_with, parameters):
    posterior = inference.build_posterior(
        sample_with=sample_with, posterior_parameters=copy.deepcopy(parameters)
    )
    theta = quiet_sample(posterior, show_progress_bars=False)
    assert theta.shape == (12, 2)
    assert bool((theta.abs() <= 1).all())


def test_sample_with_vi(inference):
    posterior = inference.build_posterior(
        sample_with="vi", posterior_parameters=VIPosteriorParameters(q="gaussian")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior.set_default_x(X_O).train(
            max_num_iters=5, min_num_iters=2, show_progress_bar=False, quality_control=False
        )
    assert posterior.sample((12,)).shape == (12, 2)


def test_map(inference):
    posterior = inference.build_posterior().set_default_x(X_O)
    theta = posterior.map(num_iter=20, num_to_optimize=5, num_init_samples=50)
    assert theta.shape == (1, 2)
    typical = posterior.log_prob(posterior.sample((50,), show_progress_bars=False)).median()
    assert posterior.log_prob(theta) > typical


def test_sample_batched(inference):
    theta = inference.build_posterior().sample_batched(
        (7,), x=torch.zeros(3, 2), show_progress_bars=False
    )
    assert theta.shape == (7, 3, 2)


def test_ensemble_and_pairplot(inference):
    other = trained("maf")
    ensemble = EnsemblePosterior([inference.build_posterior(), other.build_posterior()])
    ensemble.set_default_x(X_O)
    theta = ensemble.sample((30,), show_progress_bars=False)
    assert ensemble.log_prob(theta).shape == (30,)
    figure, _ = pairplot(theta)
    assert figure.axes


# ---------------------------------------------------------------------- the proxy's own posterior


@pytest.mark.parametrize(
    ("sample_with", "parameters"),
    [
        ("mcmc", QUICK_MCMC),
        ("rejection", QUICK_REJECTION),
        ("importance", ImportanceSamplingPosteriorParameters(oversampling_factor=4)),
    ],
)
@pytest.mark.parametrize("duplicate", [lambda p: p, lambda p: pickle.loads(pickle.dumps(p))])
def test_proxy_posterior(inference, sample_with, parameters, duplicate):
    posterior = duplicate(inference.build_proxy_posterior(sample_with, copy.deepcopy(parameters)))
    theta = quiet_sample(posterior, show_progress_bars=False)
    assert theta.shape == (12, 2)
    assert bool((theta.abs() <= 1).all())


def test_proxy_posterior_has_the_proxys_density(inference):
    posterior = inference.build_proxy_posterior().set_default_x(X_O)
    grid = torch.cartesian_prod(*[torch.linspace(-0.99, 0.99, 100)] * 2)
    exact = torch.softmax(inference.proxy.log_potential(grid.unsqueeze(1), X_O)[:, 0], 0)
    mean = (exact.unsqueeze(1) * grid).sum(0)
    # One in 32 candidates is kept: importance resampling is biased by about one in their number.
    theta = posterior.sample((4000,), oversampling_factor=32)
    spread = (exact.unsqueeze(1) * (grid - mean).square()).sum(0).sqrt()
    off = (theta.mean(0) - mean).abs() / spread
    assert float(off.max()) < 5 / math.sqrt(4000) + 1 / 32
    mass = posterior.log_prob(grid).exp().sum() * 0.02**2
    assert float(mass) == pytest.approx(1.0, abs=0.1)
    assert posterior.potential(torch.tensor([[2.0, 0.0]])) == -torch.inf


def test_proxy_posterior_at_several_observations(inference):
    posterior = inference.build_proxy_posterior("mcmc", copy.deepcopy(QUICK_MCMC))
    potential, theta = posterior.potential_fn, PRIOR.sample((3,))
    xs = torch.cat([X_O, -X_O, 0 * X_O])
    single = torch.stack([inference.proxy.log_potential(theta[:, None], x[None])[:, 0] for x in xs])
    potential.set_x(xs, x_is_iid=True)
    together = single.sum(0) - 2 * PRIOR.log_prob(theta)
    torch.testing.assert_close(potential(theta), together)
    potential.set_x(xs, x_is_iid=False)
    torch.testing.assert_close(potential(theta), single.diagonal())
    with pytest.raises(ValueError, match="one observation"):
        inference.build_proxy_posterior().sample((2,), x=xs)


def test_proxy_posterior_moves_and_has_gradients(inference):
    posterior = inference.build_proxy_posterior()
    posterior.to("cpu")
    theta = torch.zeros(4, 2, requires_grad=True)
    posterior.potential(theta, x=X_O, track_gradients=True).sum().backward()
    assert bool(torch.isfinite(theta.grad).all())


def test_proxy_posterior_without_prior_and_of_an_energy():
    options = replace(TINY, proxy="energy")
    inference = fresh(options=options, prior=None).append_simulations(*simulate())
    train(inference)
    theta = quiet_sample(inference.build_proxy_posterior("mcmc", copy.deepcopy(QUICK_MCMC)))
    assert theta.shape == (12, 2)


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"sample_with": "direct"}, ValueError),
        ({"sample_with": "mcmc", "posterior_parameters": QUICK_REJECTION}, TypeError),
    ],
)
def test_proxy_posterior_refuses(inference, kwargs, error):
    with pytest.raises(error, match=list(kwargs)[-1]):
        inference.build_proxy_posterior(**kwargs)


def test_proxy_posterior_needs_a_proxy():
    with pytest.raises(RuntimeError, match="no proxy"):
        fresh().build_proxy_posterior()


# ---------------------------------------------------------------------- diagnostics


@pytest.mark.parametrize("kind", ["main", "corrected"])
def test_sbc_and_tarp(inference, kind):
    corrected = kind == "corrected"
    posterior = (
        inference.build_corrected_posterior(200) if corrected else inference.build_posterior()
    )
    theta, x = simulate(40)
    settings = {"num_posterior_samples": 30, "show_progress_bar": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranks, dap = run_sbc(theta, x, posterior, **settings)
        assert {"ks_pvals", "c2st_ranks", "c2st_dap"} <= set(check_sbc(ranks, theta, dap, 30))
        coverage, alpha = run_tarp(theta, x, posterior, **settings)
    assert ranks.shape == (40, 2)
    assert len(check_tarp(coverage, alpha)) == 2


def test_misspecification_in_x_and_in_the_embedding():
    embedding = FCEmbedding(input_dim=2, output_dim=3, num_layers=1, num_hiddens=8)
    inference = trained(posterior_nn("maf", embedding_net=embedding))
    _, x = simulate(60)
    for mode in ("x_space", "embedding"):
        p_value, _ = calc_misspecification_mmd(
            x_obs=x[:1] + 30.0, x=x, inference=inference, mode=mode, n_shuffle=30, max_samples=50
        )
        assert 0.0 <= float(p_value) <= 1.0


# ---------------------------------------------------------------------- trackers, plots, infer


def test_plot_summary():
    inference = trained()
    _, axes = plot_summary(
        inference, tags=["validation_loss", "held_out_forward"], disable_tensorboard_prompt=True
    )
    assert [len(ax.lines) for ax in axes] == [1, 1]


@pytest.mark.parametrize("name", ["tracker", "summary_writer"])
def test_trackers(name):
    writer = SummaryWriter("logs")
    given = TensorBoardTracker(writer) if name == "tracker" else writer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inference = fresh(**{name: given}).append_simulations(*simulate())
    train(inference)
    events = EventAccumulator("logs").Reload()
    assert {"validation_loss", "held_out_forward", "trust"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("trust")] == [0, 1]


def test_infer_after_register():
    register()
    register()
    assert sbi.inference.NPE_JEFFREYS is NPE_Jeffreys
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = sbi.inference.infer(
            simulator,
            PRIOR,
            method="npe_jeffreys",
            num_simulations=40,
            init_kwargs={"options": TINY, "show_progress_bars": False},
            train_kwargs={"max_num_epochs": 1},
        )
    assert posterior.sample((3,), x=X_O, show_progress_bars=False).shape == (3, 2)

"""`repr` of a trainer says what it is and what state it is in."""

import pickle
import warnings

import pytest
import torch
from sbi.neural_nets import posterior_nn
from sbi.utils import BoxUniform

from sbi_jeffreys import FlowExpert, JeffreysOptions, NPE_Jeffreys
from sbi_jeffreys.networks.fitting import FitConfig

PRIOR = BoxUniform(-torch.ones(2), torch.ones(2))
TINY = JeffreysOptions(
    num_steps=4,
    steps_per_epoch=2,
    experts=(FlowExpert("maf"),),
    proxy_fit=FitConfig(max_epochs=2),
    proxy_folds=1,
    proxy_draws=100,
    proxy_batch_size=20,
    reverse_batch_size=10,
    min_trust=0.0,
)


def simulations(num):
    theta = PRIOR.sample((num,))
    return theta, theta + 0.2 * torch.randn_like(theta)


@pytest.fixture
def trained():
    inference = NPE_Jeffreys(PRIOR, show_progress_bars=False, options=TINY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inference.append_simulations(*simulations(100)).train(max_num_epochs=2)
    return inference


def test_before_and_after_simulations():
    inference = NPE_Jeffreys(PRIOR, "MAF", show_progress_bars=False)
    assert repr(inference) == "NPE_Jeffreys with main 'maf', without simulations, not trained"
    inference.append_simulations(*simulations(1_200))
    assert repr(inference) == (
        "NPE_Jeffreys with main 'maf', 1,200 simulations in 1 round, not trained"
    )


def test_after_training_and_of_a_copy(trained):
    first, proxy, weights = repr(trained).splitlines()
    assert first == "NPE_Jeffreys with main 'nsf', 100 simulations in 1 round, trained"
    assert proxy.startswith("  proxy (likelihood: vector x): used with trust ")
    assert trained.training_report.kept.value in weights
    assert "symmetric stage finished" in weights
    assert repr(pickle.loads(pickle.dumps(trained))) == repr(trained)


def test_newer_simulations_and_rounds_are_counted(trained):
    posterior = trained.build_posterior().set_default_x(torch.zeros(2))
    trained.append_simulations(*simulations(50), proposal=posterior)
    assert (
        repr(trained)
        .splitlines()[0]
        .endswith("150 simulations in 2 rounds, trained before the last 50 were appended")
    )


def test_problems_are_counted():
    inference = NPE_Jeffreys(PRIOR, show_progress_bars=False, options=TINY)
    theta, _ = simulations(100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inference.append_simulations(theta, torch.ones(100, 2)).train(max_num_epochs=2)
    assert repr(inference).splitlines()[2] == (
        "  symmetric stage not run; weights kept: those of plain NPE in the prior's "
        "unconstrained space; 1 problem, see training_report"
    )


def test_loaded_weights_and_lost_builders_are_said(trained, tmp_path):
    trained.save(tmp_path / "npe.pt")
    fresh = NPE_Jeffreys(PRIOR, show_progress_bars=False).load_weights(tmp_path / "npe.pt")
    assert "100 simulations in 1 round, with a main that was loaded" in repr(fresh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inference = NPE_Jeffreys(PRIOR, posterior_nn("maf"), show_progress_bars=False)
        assert "with main of " in repr(inference)
        lost = pickle.loads(pickle.dumps(inference))
    assert "with main of a builder that was not saved" in repr(lost)


def test_an_unfinished_object_has_a_repr():
    assert "NPE_Jeffreys object" in repr(NPE_Jeffreys.__new__(NPE_Jeffreys))

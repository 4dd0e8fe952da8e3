"""Every argument of the constructor and of `train`: what is wrong with it is said by its name."""

import pytest
import torch
from contract_tools import PRIOR, X_O, fresh, simulate, train, trained

from sbi_jeffreys import NPE_Jeffreys


def test_a_refused_append_leaves_no_simulations():
    """sbi refuses a proposal without a prior after it has stored them."""
    inference = trained()
    proposal = inference.build_posterior().set_default_x(X_O)
    alone = fresh(prior=None)
    alone.append_simulations(*simulate(50))
    with pytest.raises(ValueError, match="prior"):
        alone.append_simulations(*simulate(40), proposal=proposal)
    assert len(alone.get_simulations()[0]) == 50


@pytest.mark.parametrize("level", ["WARNING", "info", 10])
def test_logging_levels(level):
    NPE_Jeffreys(PRIOR, logging_level=level)


def test_unknown_density_estimator_is_said_at_once():
    with pytest.raises(ValueError, match=r"density_estimator.*nsf"):
        fresh("nfs")


def test_train_needs_simulations():
    with pytest.raises(RuntimeError, match="append_simulations"):
        fresh().train()


def test_resuming_with_another_network_is_refused_and_keeps_the_old_one():
    inference = trained()
    net = inference._neural_net
    with pytest.raises(ValueError, match=r"retrain_from_scratch.*resume_training"):
        train(inference, resume_training=True, retrain_from_scratch=True)
    assert inference._neural_net is net


def test_training_twice_is_refused_as_sbi_does():
    with pytest.raises(ValueError, match="already been trained"):
        train(trained())


def test_parameters_outside_the_prior_are_named():
    theta, x = simulate(40)
    theta[7] = torch.tensor([0.5, 3.0])
    inference = fresh().append_simulations(theta, x)
    with pytest.raises(ValueError, match=r"theta: .*1 of 40 outside it, the first in row 7: \[0.5"):
        train(inference)


@pytest.mark.parametrize("num", [1, 2])
def test_too_few_simulations_are_named(num):
    inference = fresh().append_simulations(*simulate(num))
    with pytest.raises(ValueError, match=f"two to train on and one held out, got {num}"):
        train(inference)
    inference = fresh().append_simulations(*simulate(3))
    train(inference)
    assert inference.build_posterior().sample((3,), x=X_O, show_progress_bars=False).shape == (3, 2)

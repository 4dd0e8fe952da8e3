"""Every argument of the constructor and of `train`: what is wrong with it is said by its name."""

import pytest
import torch
from contract_tools import PRIOR, TINY, X_O, fresh, simulate, train, trained

from sbi_jeffreys import NPE_Jeffreys


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("prior", 3, TypeError, "prior must be"),
        ("density_estimator", 3, TypeError, "density_estimator must be"),
        ("density_estimator", torch.nn.Linear(1, 1), TypeError, "density_estimator must be"),
        ("device", "gpuu", ValueError, "device"),
        ("device", 3, TypeError, "device"),
        ("logging_level", [], TypeError, "logging_level"),
        ("logging_level", "LOUD", ValueError, "logging_level"),
        ("summary_writer", 3, TypeError, "summary_writer"),
        ("tracker", 3, TypeError, "tracker"),
        ("show_progress_bars", "no", TypeError, "show_progress_bars"),
        ("options", {}, TypeError, "options"),
    ],
)
def test_constructor(name, value, error, match):
    with pytest.raises(error, match=match):
        NPE_Jeffreys(**{"prior": PRIOR, name: value})


@pytest.mark.parametrize("level", ["WARNING", "info", 10])
def test_logging_levels(level):
    NPE_Jeffreys(PRIOR, logging_level=level)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("num_atoms", "a", TypeError),
        ("num_atoms", 2.5, TypeError),
        ("num_atoms", 1, ValueError),
        ("training_batch_size", "a", TypeError),
        ("training_batch_size", 0, ValueError),
        ("learning_rate", "a", TypeError),
        ("learning_rate", -1.0, ValueError),
        ("validation_fraction", "a", TypeError),
        ("validation_fraction", 0.0, ValueError),
        ("validation_fraction", 1.0, ValueError),
        ("stop_after_epochs", "a", TypeError),
        ("stop_after_epochs", 0, ValueError),
        ("max_num_epochs", "a", TypeError),
        ("max_num_epochs", 0, ValueError),
        ("clip_max_norm", "a", TypeError),
        ("clip_max_norm", -1.0, ValueError),
        ("calibration_kernel", 3, TypeError),
        ("resume_training", "a", TypeError),
        ("resume_training", True, RuntimeError),
        ("force_first_round_loss", "a", TypeError),
        ("discard_prior_samples", "a", TypeError),
        ("use_combined_loss", "a", TypeError),
        ("retrain_from_scratch", "a", TypeError),
        ("show_train_summary", "a", TypeError),
        ("dataloader_kwargs", "a", TypeError),
        ("dataloader_kwargs", {"batch": 1}, TypeError),
    ],
)
def test_train(name, value, error):
    inference = fresh().append_simulations(*simulate(20))
    with pytest.raises(error, match=name):
        train(inference, **{name: value})
    assert inference._neural_net is None


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


@pytest.mark.parametrize("num_candidates", [0, 1.5, "many"])
def test_corrected_posterior_arguments(num_candidates):
    with pytest.raises(ValueError, match="num_candidates"):
        trained().build_corrected_posterior(num_candidates)


@pytest.mark.parametrize(
    ("theta", "x"), [(torch.zeros(5, 2), torch.zeros(4, 2)), ([[0.0]], torch.zeros(1, 2))]
)
def test_simulations_are_checked_by_sbi(theta, x):
    with pytest.raises((AssertionError, TypeError), match=r"[Tt]heta|parameter sets"):
        NPE_Jeffreys(PRIOR, options=TINY).append_simulations(theta, x)


def test_parameters_outside_the_prior_are_named():
    theta, x = simulate(40)
    theta[7] = torch.tensor([0.5, 3.0])
    inference = fresh().append_simulations(theta, x)
    with pytest.raises(ValueError, match=r"theta: .*1 of 40 outside it, the first in row 7: \[0.5"):
        train(inference)
    inference = fresh().append_simulations(torch.randn(40, 3), x)
    with pytest.raises(ValueError, match=r"theta: expected shape \(N, 2\) .* got \(40, 3\)"):
        train(inference)


@pytest.mark.parametrize("num", [1, 2])
def test_too_few_simulations_are_named(num):
    inference = fresh().append_simulations(*simulate(num))
    with pytest.raises(ValueError, match=f"two to train on and one held out, got {num}"):
        train(inference)
    inference = fresh().append_simulations(*simulate(3))
    train(inference)
    assert inference.build_posterior().sample((3,), x=X_O, show_progress_bars=False).shape == (3, 2)

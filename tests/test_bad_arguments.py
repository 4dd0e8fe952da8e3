"""Bad input at every public door: an error that names the argument and what came, before any work.

The rooms of proxies, posteriors and diagnostics have such files of their own.
"""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from contract_tools import PRIOR, TINY, fresh, simulate, trained
from torch.distributions import Independent, Uniform

from sbi_jeffreys import JeffreysOptions, MainBuilder, NPE_Jeffreys

INTS = ("steps_per_epoch", "proxy_batch_size", "reverse_batch_size", "reverse_samples")
INTS += ("max_doublings",)
INTS_OR_NONE = ("proxy_folds", "num_steps", "proxy_draws")
FLOATS = ("reverse_barrier", "max_multiplier", "slack_price", "dual_step_size", "tolerance")
FLOATS_MORE = ("min_trust", "checkpoint_seconds", "stage_length")
FLOATS_OR_NONE = ("learning_rate_factor", "initial_multiplier")
FLAGS = ("adaptive", "temper", "marginal_transforms")

OPTIONS = [
    *((name, value) for name in INTS + INTS_OR_NONE for value in ("a", 1.5, -1, True, [1])),
    *((name, None) for name in INTS + FLOATS + FLOATS_MORE + FLAGS),
    *(
        (name, value)
        for name in FLOATS + FLOATS_MORE + FLOATS_OR_NONE
        for value in ("a", -1.0, math.nan, math.inf, True, [0.1])
    ),
    *((name, value) for name in FLAGS for value in (0, 1, "yes", 1.0)),
    ("reverse_samples", 1),
    ("steps_per_epoch", 0),
    ("dual_step_size", 1.5),
    ("dual_step_size", 0.0),
    ("min_trust", 1.1),
    ("initial_multiplier", 11.0),
    ("proxy", "nope"),
    ("proxy", 3),
    ("proxy", None),
    ("experts", ()),
    ("experts", ("maf",)),
    ("experts", 3),
    ("proxy_fit", {}),
    ("proxy_fit", None),
    ("energy", {}),
    ("energy", None),
    ("checkpoint", 3),
    ("checkpoint", "no/such/folder/file"),
    ("checkpoint", "/"),
]


def names(error: BaseException, *words: str) -> None:
    """The message has the words, and a remedy after what came."""
    message = str(error)
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    assert len(message) > 30


@pytest.mark.parametrize(("name", "value"), OPTIONS)
def test_options(name, value):
    with pytest.raises((TypeError, ValueError)) as error:
        JeffreysOptions(**{name: value})
    names(error.value, name, "got")


def test_every_option_is_tried():
    assert {field.name for field in fields(JeffreysOptions)} == {name for name, _ in OPTIONS}


THETA, X = simulate(20)
APPENDED = {
    "theta list": (THETA.tolist(), X, "theta"),
    "theta array": (THETA.numpy(), X, "theta"),
    "theta None": (None, X, "theta"),
    "theta int": (3, X, "theta"),
    "theta double": (THETA.double(), X, "theta"),
    "theta long": (THETA.long(), X, "theta"),
    "theta 1-D": (THETA[:, 0], X, "theta"),
    "theta 3-D": (THETA[None], X, "theta"),
    "theta wide": (torch.zeros(20, 3), X, "theta"),
    "theta empty": (THETA[:0], X[:0], "theta"),
    "theta scalar": (torch.tensor(1.0), X, "theta"),
    "theta NaN": (THETA * torch.nan, X, "theta"),
    "theta inf": (THETA / 0, X, "theta"),
    "x list": (THETA, X.tolist(), "x"),
    "x array": (THETA, X.numpy(), "x"),
    "x None": (THETA, None, "x"),
    "x int": (THETA, 3, "x"),
    "x double": (THETA, X.double(), "x"),
    "x bool": (THETA, X > 0, "x"),
    "x 1-D": (THETA, X[:, 0], "x"),
    "x long": (THETA, X.long(), "x"),
    "x complex": (THETA, X + 0j, "x"),
    "x short": (THETA, X[:5], "rows"),
    "x scalar": (THETA, torch.tensor(1.0), "x"),
}


@pytest.mark.parametrize("case", APPENDED)
def test_append_simulations(case):
    theta, x, name = APPENDED[case]
    inference = fresh()
    with pytest.raises((TypeError, ValueError)) as error:
        inference.append_simulations(theta, x)
    names(error.value, name, "got")
    inference.append_simulations(*simulate(5))  # nothing of it was kept
    assert len(inference.get_simulations()[0]) == 5


def test_parameters_without_columns_are_refused_before_training():
    inference = fresh(prior=None).append_simulations(torch.randn(20), X[:1].expand(20, -1))
    inference.get_dataloaders()  # as sbi, which stores and splits them
    with pytest.raises(ValueError, match=r"theta must have shape .* got \(20,\)"):
        inference.train()


def test_later_rounds_have_the_shapes_of_earlier_ones():
    inference = fresh(prior=None).append_simulations(*simulate(20))
    for theta, x, name in ((torch.zeros(5, 3), X[:5], "theta"), (THETA[:5], X[:5, :1], "x")):
        with pytest.raises(ValueError, match=f"{name} must have rows of shape .* got"):
            inference.append_simulations(theta, x)


CONSTRUCTOR = [
    *(("prior", value) for value in (3, "uniform", [0, 1], torch.zeros(2), np.ones(2))),
    *(("density_estimator", value) for value in (3, [], torch.nn.Linear(1, 1), "nfs", 1.5)),
    *(("device", value) for value in (3, "gpuu", [], 1.5, "cuda:x")),
    *(("logging_level", value) for value in ([], "LOUD", True, 1.5)),
    *(("summary_writer", value) for value in (3, "x", [])),
    *(("tracker", value) for value in (3, "x", [])),
    *(("show_progress_bars", value) for value in ("no", 0, None, 1.0)),
    *(("options", value) for value in ({}, 3, "x", JeffreysOptions)),
]


@pytest.mark.parametrize(("name", "value"), CONSTRUCTOR)
def test_constructor(name, value):
    with pytest.raises((TypeError, ValueError)) as error:
        NPE_Jeffreys(**{"prior": PRIOR, name: value})
    names(error.value, name)


WHOLE = ("training_batch_size", "stop_after_epochs", "max_num_epochs")
REAL = ("learning_rate", "validation_fraction", "clip_max_norm")
FLAGS_OF_TRAIN = (
    "resume_training",
    "force_first_round_loss",
    "discard_prior_samples",
    "use_combined_loss",
    "retrain_from_scratch",
    "show_train_summary",
)
TRAIN = [
    *((name, value) for name in ("num_atoms", *WHOLE) for value in ("a", 0, -3, 2.5, None, True)),
    *((name, value) for name in REAL for value in ("a", 0.0, -1.0, math.nan, math.inf, True)),
    ("validation_fraction", 1.0),
    ("learning_rate", None),
    *((name, value) for name in FLAGS_OF_TRAIN for value in ("a", 1, None)),
    *(("calibration_kernel", value) for value in (3, "x", [])),
    ("calibration_kernel", lambda x: x),
    ("calibration_kernel", lambda x: torch.ones(3)),
    ("calibration_kernel", lambda x: 1.0),
    ("calibration_kernel", lambda x: -torch.ones(len(x))),
    ("calibration_kernel", lambda x: torch.full((len(x),), math.nan)),
    *(("dataloader_kwargs", value) for value in ("a", 3, {"batch": 1}, {1: 2})),
]


@pytest.mark.parametrize(("name", "value"), TRAIN)
def test_train(name, value):
    inference = fresh().append_simulations(*simulate(20))
    with pytest.raises((TypeError, ValueError)) as error:
        inference.train(**{name: value})
    names(error.value, name)
    assert inference._neural_net is None


@pytest.fixture(scope="module")
def inference():
    return trained()


POSTERIORS = [
    *(("num_candidates", value) for value in ("a", 0, -1, 1.5, True)),
    *(("power", value) for value in ("a", 0.0, -1.0, 1.1, math.nan, True)),
]


@pytest.mark.parametrize(("name", "value"), POSTERIORS)
def test_corrected_posterior(inference, name, value):
    with pytest.raises((TypeError, ValueError)) as error:
        inference.build_corrected_posterior(**{name: value})
    names(error.value, name)


@pytest.mark.parametrize("value", ["nuts", 3, None, []])
def test_proxy_posterior(inference, value):
    with pytest.raises((TypeError, ValueError)) as error:
        inference.build_proxy_posterior(sample_with=value)
    names(error.value, "sample_with")


@pytest.mark.parametrize("path", ["no/such/folder/file", "/"])
def test_paths(inference, path):
    with pytest.raises((OSError, ValueError)):
        inference.save(path)
    with pytest.raises((FileNotFoundError, ValueError)):
        NPE_Jeffreys.load(path)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"model": 3}, "model"),
        ({"model": None}, "model"),
        ({"model": "nfs"}, "density_estimator"),
        ({"embedding_net": 3}, "embedding_net"),
        ({"embedding_net": "cnn"}, "embedding_net"),
        ({"marginal_transforms": 1}, "marginal_transforms"),
    ],
)
def test_builder(arguments, name):
    with pytest.raises((TypeError, ValueError)) as error:
        MainBuilder(**arguments)
    names(error.value, name, "got")


def test_what_sbi_accepts_stays_accepted():
    theta, x = simulate(30)
    x[3] = torch.nan
    assert len(fresh().append_simulations(theta, x).get_simulations()[0]) == 29
    x = torch.randn(30, 4, 2)
    assert fresh().append_simulations(theta, x).get_simulations()[1].shape == (30, 4, 2)
    fresh(options=TINY, prior=None).append_simulations(torch.randn(30, 5), x)


def test_a_path_like_checkpoint_is_accepted(tmp_path):
    JeffreysOptions(checkpoint=tmp_path / "file")


@pytest.mark.parametrize(
    "prior",
    [
        Uniform(torch.zeros(2), torch.ones(2)),
        Uniform(0.0, 1.0),
    ],
    ids=str,
)
def test_a_prior_with_a_density_of_each_component(prior):
    with pytest.raises(ValueError, match=r"prior must have an event shape .*Independent") as error:
        NPE_Jeffreys(prior)
    names(error.value, "prior", "got event_shape ()")
    if prior.batch_shape:
        NPE_Jeffreys(Independent(prior, 1))

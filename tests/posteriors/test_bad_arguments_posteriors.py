"""Bad arguments of posteriors: refused with the argument's name, what came, and before any draw."""

import math

import numpy as np
import pytest
import torch
from contract_tools import refused
from known_posteriors import PRIOR, Known, gaussian, log_likelihood
from sbi.inference.posteriors.posterior_parameters import MCMCPosteriorParameters

from sbi_jeffreys import CorrectedPosterior, GivenProxy
from sbi_jeffreys.posteriors import (
    ProxyPotential,
    best_power,
    importance_quality,
    pareto_k,
    pooling_power,
    proxy_posterior,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*no parameters/buffers")

MAIN = Known(gaussian())
PROXY = GivenProxy(PRIOR, log_likelihood)
X, MANY, THETA = torch.zeros(2), torch.zeros(3, 2), torch.zeros(4, 2)
QUIET = {"show_progress_bars": False}


def build(main=MAIN, proxy=PROXY, prior=PRIOR, **kwargs):
    return CorrectedPosterior(main, proxy, prior, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "parts"),
    [
        ({"main": None}, TypeError, ("main must", "NoneType")),
        ({"main": "nsf"}, TypeError, ("main must", "str")),
        ({"main": torch.nn.Linear(2, 2)}, TypeError, ("main must", "Linear")),
        ({"proxy": None}, TypeError, ("proxy must", "NoneType")),
        ({"proxy": log_likelihood}, TypeError, ("proxy must", "function")),
        ({"prior": None}, TypeError, ("prior must", "NoneType")),
        ({"prior": THETA}, TypeError, ("prior must", "Tensor", "sample and log_prob")),
        ({"num_candidates": 0}, ValueError, ("num_candidates must", "got 0")),
        ({"num_candidates": -5}, ValueError, ("num_candidates must", "got -5")),
        ({"num_candidates": 1e4}, TypeError, ("num_candidates must", "float")),
        ({"num_candidates": True}, TypeError, ("num_candidates must", "bool")),
        ({"num_candidates": "many"}, TypeError, ("num_candidates must", "str")),
        ({"power": 0.0}, ValueError, ("power must", "got 0.0")),
        ({"power": 2}, ValueError, ("power must", "got 2")),
        ({"power": math.inf}, ValueError, ("power must", "got inf")),
        ({"power": None}, TypeError, ("power must", "NoneType", "build_posterior")),
        ({"power": [0.5]}, TypeError, ("power must", "[0.5]")),
    ],
)
def test_constructor(kwargs, error, parts):
    refused(lambda: build(**kwargs), error, *parts)


@pytest.mark.parametrize(
    ("x", "error", "parts"),
    [
        (None, ValueError, ("x must", "got None", "set_default_x")),
        ("x", TypeError, ("x must", "got str")),
        ({}, TypeError, ("x must", "got dict")),
        (torch.zeros(3), ValueError, ("x must", "(2,)", "got shape (3,)")),
        (torch.zeros(()), ValueError, ("x must", "(2,)", "got shape ()")),
        (torch.zeros(0), ValueError, ("x must", "(2,)", "got shape (0,)")),
        (torch.zeros(3, 2), ValueError, ("x must", "got shape (3, 2)", "sample_batched")),
        (torch.zeros(2, 2, 1), ValueError, ("x must", "got shape (2, 2, 1)")),
        (torch.tensor([math.nan, 0.0]), ValueError, ("x must be finite", "1 of 2")),
        (torch.tensor([math.inf, 0.0]), ValueError, ("x must be finite", "1 of 2")),
    ],
)
@pytest.mark.parametrize(
    "method",
    [
        lambda p, x: p.sample((5,), x=x, **QUIET),
        lambda p, x: p.log_prob(THETA, x=x),
        lambda p, x: p.quality(x),
        lambda p, x: p.weighted_sample(10, x),
    ],
    ids=["sample", "log_prob", "quality", "weighted_sample"],
)
def test_one_observation(method, x, error, parts):
    refused(lambda: method(build(), x), error, *parts)


@pytest.mark.parametrize(
    ("x", "error", "parts"),
    [
        (None, TypeError, ("x must", "NoneType")),
        ("x", TypeError, ("x must", "str")),
        (torch.zeros(3), ValueError, ("x must", "(B, 2)", "got shape (3,)")),
        (torch.zeros(3, 3), ValueError, ("x must", "(B, 2)", "got shape (3, 3)")),
        (torch.zeros(0, 2), ValueError, ("x must", "B ≥ 1", "got shape (0, 2)")),
        (torch.zeros(1, 3, 2), ValueError, ("x must", "got shape (1, 3, 2)")),
        (torch.full((3, 2), math.nan), ValueError, ("x must be finite", "6 of 6")),
    ],
)
@pytest.mark.parametrize(
    "method",
    [
        lambda p, x: p.sample_batched((5,), x, **QUIET),
        lambda p, x: p.log_prob_batched(torch.zeros(4, 3, 2), x),
    ],
    ids=["sample_batched", "log_prob_batched"],
)
def test_many_observations(method, x, error, parts):
    refused(lambda: method(build(), x), error, *parts)


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda p: p.sample(10, x=X), TypeError, ("sample_shape must", "int (10)")),
        (lambda p: p.sample(None, x=X), TypeError, ("sample_shape must", "NoneType")),
        (lambda p: p.sample((2.0,), x=X), TypeError, ("sample_shape must", "(2.0,)")),
        (lambda p: p.sample((0,), x=X), ValueError, ("sample_shape must", "(0,)")),
        (lambda p: p.sample((3, -1), x=X), ValueError, ("sample_shape must", "(3, -1)")),
        (lambda p: p.sample_batched("5", MANY), TypeError, ("sample_shape must", "str")),
        (lambda p: p.sample((5,), X, 0), ValueError, ("max_sampling_batch_size must", "got 0")),
        (lambda p: p.sample((5,), X, 1e3), TypeError, ("max_sampling_batch_size must", "float")),
        (lambda p: p.sample((5,), X, 10, 1), TypeError, ("show_progress_bars must", "int (1)")),
        (
            lambda p: p.sample_batched((5,), MANY, 0),
            ValueError,
            ("max_sampling_batch_size must", "got 0"),
        ),
        (
            lambda p: p.sample_batched((5,), MANY, 10, "no"),
            TypeError,
            ("show_progress_bars must", "str"),
        ),
        (
            lambda p: p.sample_batched((5,), MANY, 10, False, 0),
            ValueError,
            ("num_candidates must", "got 0"),
        ),
        (lambda p: p.weighted_sample(0, X), ValueError, ("num_candidates must", "got 0")),
        (lambda p: p.weighted_sample(None, X), TypeError, ("num_candidates must", "NoneType")),
        (lambda p: p.quality(X, 1.5), TypeError, ("num_candidates must", "float")),
        (lambda p: p.effective_sample_size(X, 0), ValueError, ("num_candidates must", "got 0")),
        (lambda p: p.quality(X, "all"), TypeError, ("num_candidates must", "str")),
        (lambda p: p.log_prob("θ", X), TypeError, ("theta must", "str")),
        (lambda p: p.log_prob(None, X), TypeError, ("theta must", "NoneType")),
        (lambda p: p.log_prob(torch.zeros(4, 3), X), ValueError, ("theta must", "(4, 3)")),
        (lambda p: p.log_prob(torch.zeros(()), X), ValueError, ("theta must", "()")),
        (lambda p: p.log_prob(torch.zeros(1, 4, 2), X), ValueError, ("theta must", "(1, 4, 2)")),
        (lambda p: p.log_prob(THETA, X, 1), TypeError, ("norm_posterior must", "int (1)")),
        (lambda p: p.log_prob(THETA, X, True, 0), TypeError, ("track_gradients must", "int (0)")),
        (
            lambda p: p.log_prob(THETA, X, num_candidates=0),
            ValueError,
            ("num_candidates must", "got 0"),
        ),
        (
            lambda p: p.log_prob_batched(torch.zeros(4, 2, 2), MANY),
            ValueError,
            ("theta must", "(N, 3, 2)", "(4, 2, 2)"),
        ),
        (
            lambda p: p.log_prob_batched(torch.zeros(2, 2), MANY),
            ValueError,
            ("theta must", "(N, 3, 2)", "(2, 2)"),
        ),
        (
            lambda p: p.log_prob_batched(torch.zeros(4, 3, 2), MANY, "yes"),
            TypeError,
            ("norm_posterior must", "str"),
        ),
    ],
)
def test_methods(call, error, parts):
    refused(lambda: call(build()), error, *parts)


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda: proxy_posterior(None, PROXY, "mcmc", None, "cpu"), TypeError, ("main must",)),
        (lambda: proxy_posterior(MAIN, None, "mcmc", None, "cpu"), TypeError, ("proxy must",)),
        (
            lambda: proxy_posterior(MAIN, PROXY, "direct", None, "cpu"),
            ValueError,
            ("sample_with must", "'mcmc'", "got 'direct'", "unnormalised"),
        ),
        (
            lambda: proxy_posterior(MAIN, PROXY, "nuts", None, "cpu"),
            ValueError,
            ("sample_with must", "got 'nuts'"),
        ),
        (
            lambda: proxy_posterior(MAIN, PROXY, None, None, "cpu"),
            TypeError,
            ("sample_with must", "NoneType"),
        ),
        (
            lambda: proxy_posterior(MAIN, PROXY, "rejection", MCMCPosteriorParameters(), "cpu"),
            TypeError,
            ("posterior_parameters must", "got MCMC", "sample_with='rejection' needs"),
        ),
        (
            lambda: proxy_posterior(MAIN, PROXY, "mcmc", {"num_chains": 3}, "cpu"),
            TypeError,
            ("posterior_parameters must", "got dict"),
        ),
        (lambda: ProxyPotential(None, torch.Size((2,))), TypeError, ("proxy must", "NoneType")),
        (lambda: pareto_k([0.0] * 50), TypeError, ("log_weights must", "list")),
        (lambda: pareto_k(torch.zeros(5, 2)), ValueError, ("log_weights must", "(5, 2)")),
        (lambda: importance_quality(np.zeros(9)), TypeError, ("log_weights must", "ndarray")),
        (lambda: best_power(torch.zeros(5), X), ValueError, ("log_ratio must", "(5,)")),
        (lambda: best_power(MANY, MANY), ValueError, ("log_ratio_true must", "(3, 2)")),
        (lambda: pooling_power(MAIN, PROXY, X, X), ValueError, ("theta must", "(2,)")),
        (lambda: pooling_power(MAIN, PROXY, THETA, MANY), ValueError, ("x must", "(3, 2)")),
        (
            lambda: pooling_power(MAIN, PROXY, MANY, MANY, 0),
            ValueError,
            ("num_samples must", "got 0"),
        ),
    ],
)
def test_functions(call, error, parts):
    refused(call, error, *parts)


def test_arrays_lists_and_a_batch_dimension_are_accepted():
    posterior = build(num_candidates=500)
    for x in (X, X[None], X.numpy(), [0.0, 0.0], X.double()):
        assert posterior.sample((3,), x=x, **QUIET).shape == (3, 2)
    assert posterior.sample(x=X, **QUIET).shape == (2,)
    assert posterior.log_prob(X.numpy(), x=X).shape == (1,)
    assert posterior.sample_batched((3,), X, **QUIET).shape == (3, 1, 2)

"""Bad arguments of the proxies' settings: each is refused at once, by an error that names it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from sbi_jeffreys import (
    EnergyConfig,
    EnergyProxy,
    FlowExpert,
    GivenProxy,
    JeffreysOptions,
    LikelihoodProxy,
    RegressionExpert,
)
from sbi_jeffreys.networks.fitting import FitConfig

PRIOR = MultivariateNormal(torch.zeros(2), torch.eye(2))
NAN, INF = math.nan, math.inf


def flat(theta, x):
    return torch.zeros(len(theta))


def given(prior=PRIOR, log_likelihood=flat, sample_x=None):
    return GivenProxy(prior, log_likelihood, sample_x)


def likelihood(prior=PRIOR, **kwargs):
    return LikelihoodProxy(prior, **kwargs)


def energy(prior=PRIOR, **kwargs):
    return EnergyProxy(prior, **kwargs)


_POSITIVE = (0, -1.0, NAN, INF, "a", None, True, [1e-3], torch.tensor(1e-3))
_NOT_NEGATIVE = (-1.0, NAN, INF, "a", True)
_COUNT = (0, -1, 1.5, "3", True, NAN)
BAD = [
    *((FitConfig, "learning_rate", v) for v in _POSITIVE),
    *((FitConfig, "weight_decay", v) for v in (*_NOT_NEGATIVE, None)),
    *((FitConfig, "batch_size", v) for v in _COUNT),
    *((FitConfig, "patience", v) for v in (*_COUNT, None)),
    *((FitConfig, "patience_steps", v) for v in _COUNT),
    *((FitConfig, "max_epochs", v) for v in (*_COUNT, None)),
    *((FitConfig, "ema_decay", v) for v in (2, 1.0, -0.1, NAN, "a", None)),
    *((FitConfig, "clip_max_norm", v) for v in (0.0, -1.0, NAN, "a", True)),
    *((FlowExpert, "model", v) for v in ("nope", "mnle", "", None, 3, ["maf"])),
    *((FlowExpert, "weight_decay", v) for v in _NOT_NEGATIVE),
    *((FlowExpert, "learning_rate", v) for v in (0, -1.0, NAN, INF, "a", True)),
    *((FlowExpert, "num_transforms", v) for v in (*_COUNT, None)),
    *((FlowExpert, "marginal_transform", v) for v in (1, None, "yes")),
    *((FlowExpert, "around_regression", v) for v in (1, None, "yes")),
    *((RegressionExpert, "degree", v) for v in (0, 3, 1.0, True, "linear", None)),
    *((RegressionExpert, "kernel", v) for v in (1, None, "rbf", True)),  # of degree 2
    *((RegressionExpert, "mixture", v) for v in (1, None, 2)),
    *((EnergyConfig, "classifier", v) for v in ("linear", None, 3, nn.Linear(2, 2))),
    *((EnergyConfig, "hidden_features", v) for v in (*_COUNT, None)),
    *((EnergyConfig, "num_contrasts", v) for v in (3, *_COUNT, None)),
    *((EnergyConfig, "refresh_epochs", v) for v in (*_COUNT, None)),
    *((EnergyConfig, "share_embedding", v) for v in (1, None, "yes")),
    *((EnergyConfig, "fit", v) for v in ({}, None, 1e-3)),
    *((likelihood, "experts", v) for v in ((), ("maf",), "maf", 3, FlowExpert())),
    *((likelihood, "config", v) for v in ({}, 1e-3, EnergyConfig())),
    *((likelihood, "num_folds", v) for v in _COUNT),
    *((energy, "config", v) for v in ({}, FitConfig(), "mlp")),
    *((energy, "embedding_net", v) for v in (lambda x: x, "cnn", 3)),
    *((given, "log_likelihood", v) for v in (3.0, None, "normal")),
    *((given, "sample_x", v) for v in (3.0, "normal", [1])),
    *((make, "prior", v) for make in (likelihood, energy, given) for v in (None, 3, [PRIOR])),
    *((JeffreysOptions, "experts", v) for v in ((), ("maf",), "maf", 3, FlowExpert())),
]


@pytest.mark.parametrize(("make", "name", "value"), BAD)
def test_bad_arguments_are_named(make, name, value):
    with pytest.raises((TypeError, ValueError)) as found:
        make(**{name: value})
    message = str(found.value)
    assert name in message
    assert ", got " in message  # what came
    assert "; " in message.split(", got ", 1)[1]  # the remedy


def test_what_is_allowed_is_accepted():
    FitConfig(batch_size=None, patience_steps=None, clip_max_norm=None, ema_decay=0.0)
    for model in ("maf", "nsf", "maf_rqs", "mdn", "made", "zuko_nsf"):
        FlowExpert(model, weight_decay=None, learning_rate=None)
    assert likelihood(experts=[FlowExpert()]).experts == (FlowExpert(),)


@pytest.mark.parametrize(
    ("expert", "expected"),
    [
        (FlowExpert(num_transforms=1), (0.01, 0.2)),
        (FlowExpert(num_transforms=1, weight_decay=0.0), (0.01, 0.0)),
        (FlowExpert(num_transforms=1, learning_rate=3e-3), (3e-3, 0.2)),
    ],
)
def test_an_experts_own_settings_take_precedence_over_the_fits(expert, expected, monkeypatch):
    """`proxy_fit.learning_rate` and `.weight_decay` are of all experts that have none."""
    from sbi_jeffreys.networks import together

    seen, original = [], together.fit_network

    def spy(net, loss, train, val, config, *rest):
        seen.append((config.learning_rate, config.weight_decay))
        return original(net, loss, train, val, config, *rest)

    monkeypatch.setattr(together, "fit_network", spy)
    config = FitConfig(max_epochs=1, learning_rate=0.01, weight_decay=0.2)
    theta, rows = PRIOR.sample((40,)), torch.arange(40)
    proxy = LikelihoodProxy(PRIOR, (expert,), config, num_folds=1)
    proxy.fit(theta, theta + torch.randn(40, 2), rows[:30], rows[30:])
    assert seen == [expected]

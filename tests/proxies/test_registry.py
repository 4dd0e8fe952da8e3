"""A new kind of expert: one class, one line in the registry, and the proxy fits and weighs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from sbi.utils import BoxUniform
from torch import nn
from torch.distributions import Normal

from sbi_jeffreys import JeffreysOptions, LikelihoodProxy, RegressionExpert
from sbi_jeffreys.proxies import experts
from sbi_jeffreys.proxies.experts import Expert
from sbi_jeffreys.proxies.folds import Bag


class SineNet(nn.Module):
    """N(sin 6z, scale²): the simulator's own likelihood, up to the scale."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def log_prob(self, y, z):
        return Normal(torch.sin(6 * z), self.scale).log_prob(y).sum(-1)

    def sample(self, sample_shape, z):
        return Normal(torch.sin(6 * z), self.scale).sample(sample_shape)


@dataclass(frozen=True)
class SineExpert(Expert):
    """The kind: its scale is estimated, all else is known."""

    closed_form: ClassVar[bool] = True

    def fit(self, data, before, abandon_above):
        z, x = data.z[data.train], data.x[data.train]
        net = SineNet(float((x - torch.sin(6 * z)).std()))
        return data.fitted(self, net, data.scales[1])


@dataclass(frozen=True)
class SineNetworkExpert(SineExpert):
    """As if it were a network: cross-fitted ones are averaged."""

    closed_form: ClassVar[bool] = False


def pairs(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    theta = BoxUniform(-torch.ones(1), torch.ones(1)).sample((num,))
    return theta, torch.sin(6 * theta) + 0.1 * torch.randn(num, 1)


@pytest.mark.parametrize("kind", [SineExpert, SineNetworkExpert])
@pytest.mark.parametrize("folds", [1, 3])
def test_a_registered_kind_is_fitted_and_weighed(kind, folds, monkeypatch):
    monkeypatch.setattr(experts, "EXPERT_KINDS", [*experts.EXPERT_KINDS, kind])
    specs = (RegressionExpert(1), kind())
    assert JeffreysOptions(experts=specs).experts == specs
    theta, x = pairs(120)
    prior = BoxUniform(-torch.ones(1), torch.ones(1))
    proxy = LikelihoodProxy(prior, specs, num_folds=folds)
    proxy.fit(theta, x, torch.arange(100), torch.arange(100, 120))
    best = proxy.fitted[int(proxy.weights.argmax())]
    assert best.spec == kind()
    assert float(proxy.weights.max()) > 0.9  # a line is 1.9 nats per pair worse
    assert isinstance(best.net, Bag) == (folds > 1 and not kind.closed_form)
    drawn, y = proxy.sample_joint(2_000)
    median = (y - torch.sin(6 * drawn)).abs().median()  # the line has a small weight, too
    assert float(median) == pytest.approx(0.0674, abs=0.015)


def test_an_unregistered_kind_is_refused():
    for refused in ((SineExpert(),), ("maf",), (), "maf", RegressionExpert(1)):
        with pytest.raises(TypeError, match=r"experts must be a non-empty tuple of FlowExpert, "):
            LikelihoodProxy(BoxUniform(-torch.ones(1), torch.ones(1)), refused)  # type: ignore

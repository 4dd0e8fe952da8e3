"""A proxy that is passed in the options belongs to whoever made it: each trainer fits a copy."""

import threading
from dataclasses import replace

import pytest
import torch
from contract_tools import PRIOR, TINY, fresh, simulate, train

from sbi_jeffreys import GivenProxy, LikelihoodProxy, RegressionExpert
from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.proxies.experts import Expert
from sbi_jeffreys.proxies.stacking import stacking_weights

REGRESSION: tuple[Expert, ...] = (RegressionExpert(1),)


def test_two_trainers_with_the_same_options_fit_a_proxy_each():
    torch.manual_seed(0)
    given = LikelihoodProxy(PRIOR, REGRESSION, FitConfig(max_epochs=2), num_folds=1)
    theta, x = simulate()
    first, second = (fresh(options=replace(TINY, proxy=given)) for _ in range(2))
    train(first.append_simulations(theta, x))
    assert first.proxy is not None
    before = first.proxy.log_factor(theta.unsqueeze(0), x)
    train(second.append_simulations(theta, -5 * x))
    assert second.proxy is not first.proxy
    assert torch.equal(first.proxy.log_factor(theta.unsqueeze(0), x), before)
    assert len(given.fitted) == 0  # not fitted
    assert first.proxy.prior is second.proxy.prior is PRIOR


def log_likelihood(theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return -((x - theta) ** 2).sum(-1) / (2 * 0.3**2)


class Locked(Proxy):
    """A proxy of the user's that cannot be copied."""

    def __init__(self) -> None:
        super().__init__(PRIOR)
        self.lock = threading.Lock()

    def log_factor(self, theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return -((x - theta) ** 2).sum(-1)


@pytest.mark.parametrize("proxy", [GivenProxy(PRIOR, log_likelihood), Locked()])
def test_what_has_nothing_to_fit_or_cannot_be_copied_is_shared(proxy: Proxy):
    inference = fresh(options=replace(TINY, proxy=proxy)).append_simulations(*simulate())
    train(inference)
    assert inference.proxy is proxy


def test_a_second_fit_forgets_the_first():
    """Of 40 outputs some are left out; of five none is, and draws must have five."""
    torch.manual_seed(0)
    theta = PRIOR.sample((300,))
    x = torch.randn(300, 40)
    x[:, :2] += 3 * theta
    train_rows, val_rows = torch.arange(270), torch.arange(270, 300)
    proxy = LikelihoodProxy(PRIOR, REGRESSION, num_folds=1).fit(theta, x, train_rows, val_rows)
    assert proxy.remark
    assert proxy.sample_joint(20)[1].shape[1] == 40
    proxy.fit(theta, x[:, :5], train_rows, val_rows)
    assert proxy.remark == ""
    assert proxy.drawn is None
    assert proxy.sample_joint(20)[1].shape[1] == 5


def test_of_more_experts_than_fifty_some_are_kept(monkeypatch):
    """Sixty equal ones have a weight of 1/60 each, below the bound of 0.02; two stand for them."""
    equal = stacking_weights(torch.zeros(60, 30))[:2]
    assert float(equal.max()) < 0.02
    monkeypatch.setattr("sbi_jeffreys.proxies.likelihood.stacking_weights", lambda _: equal)
    experts = (RegressionExpert(1), RegressionExpert(2))
    theta, x = simulate(100)
    proxy = LikelihoodProxy(PRIOR, experts, FitConfig(max_epochs=2), num_folds=1)
    proxy.fit(theta, x, torch.arange(80), torch.arange(80, 100))
    assert proxy.weights.tolist() == pytest.approx([0.5, 0.5])
    assert len(proxy.sample_joint(100)[0]) > 80

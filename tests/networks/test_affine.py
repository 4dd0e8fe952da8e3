"""The faster affine autoregressive layers compute what nflows' do."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from nflows.transforms import MaskedAffineAutoregressiveTransform
from sbi.neural_nets import likelihood_nn, posterior_nn
from sbi.utils import BoxUniform

from sbi_jeffreys import MainBuilder
from sbi_jeffreys.networks.affine import (
    FastAffineAutoregressive,
    fast_tanh,
    with_fast_affine_layers,
)
from sbi_jeffreys.proxies import LikelihoodProxy
from sbi_jeffreys.proxies.experts.flow import FlowExpert


@pytest.fixture(scope="module")
def flows():
    """One flow of nflows, and its copy with the faster layers."""
    torch.manual_seed(0)
    net = likelihood_nn("maf")(torch.randn(200, 3), torch.randn(200, 4)).eval()
    return net, with_fast_affine_layers(copy.deepcopy(net))


def _layers(net):
    return [m for m in net.modules() if isinstance(m, MaskedAffineAutoregressiveTransform)]


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 3e-7), (torch.float64, 1e-15)])
def test_the_faster_tanh_is_tanh(dtype, atol):
    u = torch.cat([torch.linspace(-30, 30, 6001), torch.tensor([-torch.inf, torch.inf])]).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(fast_tanh(u), torch.tanh(u), rtol=0, atol=atol)
        assert fast_tanh(torch.tensor(torch.nan)).isnan()
    before = u.clone()
    fast_tanh(u)
    assert torch.equal(u, before)  # the argument is not overwritten


def test_it_has_the_gradient_of_tanh():
    u = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fast_tanh, u)


def test_without_gradients_torch_s_tanh_is_not_called(monkeypatch):
    def slow(u):
        raise AssertionError("torch.tanh was called")

    monkeypatch.setattr(torch, "tanh", slow)
    with torch.no_grad():
        assert fast_tanh(torch.zeros(2)).tolist() == [0.0, 0.0]


def test_a_flow_has_the_same_density_gradient_and_draws(flows):
    theta, x = torch.randn(50, 3), torch.randn(50, 4)
    losses, gradients, drawn = [], [], []
    for net in flows:
        with torch.no_grad():
            losses.append(net.log_prob(x.unsqueeze(0), theta))
        net.zero_grad()
        net.loss(x, theta).mean().backward()
        gradients.append([p.grad for p in net.parameters() if p.requires_grad])
        torch.manual_seed(1)
        drawn.append(net.sample(torch.Size((2,)), theta).detach())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-3)


def test_weights_can_be_exchanged(flows):
    slow, fast = flows
    assert list(slow.state_dict()) == list(fast.state_dict())
    assert all(type(m) is MaskedAffineAutoregressiveTransform for m in _layers(slow))
    again = pickle.load(io.BytesIO(pickle.dumps(fast)))
    assert len(_layers(again)) == 5
    assert all(type(m) is FastAffineAutoregressive for m in _layers(again))


def test_scales_are_contiguous(flows):
    layer = _layers(flows[1])[0]
    scale, _ = layer._unconstrained_scale_and_shift(torch.randn(10, 8))
    assert scale.is_contiguous()


def test_other_activations_are_left_alone():
    layer = MaskedAffineAutoregressiveTransform(3, 8, activation=torch.nn.functional.relu)
    net = with_fast_affine_layers(torch.nn.Sequential(layer))
    assert net[0].autoregressive_net.activation is torch.nn.functional.relu


def test_flows_of_a_main_and_of_a_proxy_have_them():
    torch.manual_seed(0)
    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    theta = prior.sample((60,))
    x = theta + 0.1 * torch.randn(60, 2)
    main = MainBuilder("maf", prior=prior)(theta, x)
    proxy = LikelihoodProxy(prior, experts=(FlowExpert(num_transforms=2),), num_folds=1)
    proxy.fit(theta, x, torch.arange(50), torch.arange(50, 60), max_epochs=1)
    for net, number in ((main, 5), (proxy, 2)):
        layers = _layers(net)
        assert len(layers) == number
        for layer in layers:
            assert type(layer) is FastAffineAutoregressive
            parts = list(layer.autoregressive_net.modules())
            used = [part.activation for part in parts if hasattr(part, "activation")]
            assert used.count(fast_tanh) == len(used) > 0


def test_sbi_s_own_nets_are_not_touched():
    net = posterior_nn("maf")(torch.randn(50, 2), torch.randn(50, 2))
    assert not any(isinstance(m, FastAffineAutoregressive) for m in net.modules())

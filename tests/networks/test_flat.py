"""The parameters of a network as one vector: the same training, fewer calls."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sbi_jeffreys.networks.fitting import FitConfig, fit_network
from sbi_jeffreys.networks.flat import flat_copy, flattened


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def _train(net: nn.Module, weights: list[nn.Parameter], num_steps: int = 20) -> None:
    optimizer = torch.optim.AdamW(weights, lr=0.05, weight_decay=0.1)
    x, y = torch.randn(16, 3, generator=torch.Generator().manual_seed(1)), torch.ones(16, 2)
    for _ in range(num_steps):
        optimizer.zero_grad(set_to_none=False)
        ((net(x) - y) ** 2).mean().backward()
        nn.utils.clip_grad_norm_(weights, 0.1)
        optimizer.step()


def test_training_on_the_vector_is_training_on_the_parameters():
    plain, flat = _net(), _net()
    _train(plain, list(plain.parameters()))
    own = list(flat.parameters())
    with flattened(flat) as weights:
        assert len(weights) == 1
        _train(flat, weights)
    for p, q, before in zip(plain.parameters(), flat.parameters(), own):
        assert q is before  # still the parameter that others may hold
        assert torch.allclose(p, q, atol=1e-6)
        assert q.grad is None
    assert not torch.allclose(own[0], next(_net().parameters()), atol=0.01)  # it was trained


def test_parameters_are_their_own_again_afterwards():
    net = _net()
    with flattened(net) as (vector,):
        pass
    with torch.no_grad():
        vector.add_(1.0)
    assert torch.equal(net[0].weight, _net()[0].weight)
    assert net[0].weight.untyped_storage().nbytes() == 24 * 4


def test_a_vector_used_again_takes_the_values_and_keeps_the_optimiser():
    once, twice = _net(), _net()
    results = []
    for net, pieces in ((once, (20,)), (twice, (12, 8))):
        vector = flat_copy(net)
        assert vector is not None
        optimizer = torch.optim.Adam([vector], lr=0.05)
        for steps in pieces:
            with flattened(net, vector) as weights:
                assert weights[0] is vector
                for _ in range(steps):
                    optimizer.zero_grad(set_to_none=False)
                    (net(torch.ones(4, 3)) ** 2).sum().backward()
                    optimizer.step()
        results.append([p.detach().clone() for p in net.parameters()])
    for p, q in zip(*results):
        assert torch.equal(p, q)
    with torch.no_grad():
        once[0].weight.fill_(7.0)  # as loading a state does between two epochs
    vector = flat_copy(_net())
    with flattened(once, vector) as (vector,):
        assert torch.equal(vector[:24], torch.full((24,), 7.0))


def test_frozen_parameters_are_left_out():
    net = _net()
    net[0].requires_grad_(False)
    with flattened(net) as (vector,):
        assert vector.shape == (8 * 2 + 2,)


@pytest.mark.parametrize("kind", ["complex", "mixed", "none"])
def test_what_does_not_fit_in_one_vector_stays_as_it_is(kind):
    net = _net()
    if kind == "complex":
        net = nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    elif kind == "mixed":
        net[2].double()
    else:
        net.requires_grad_(False)
    assert flat_copy(net) is None
    with flattened(net) as weights:
        trainable = [p for p in net.parameters() if p.requires_grad]
        assert [id(p) for p in weights] == [id(p) for p in trainable]


def test_parameters_come_back_after_an_error():
    net = _net()
    with pytest.raises(KeyboardInterrupt), flattened(net):
        raise KeyboardInterrupt
    assert copy.deepcopy(net)[0].weight.untyped_storage().nbytes() == 24 * 4


def test_an_interrupted_fit_keeps_the_best_weights():
    net, seen = nn.Linear(1, 1), []

    def interrupt(epoch: int, value: float) -> None:
        seen.append(value)
        if epoch == 5:
            raise KeyboardInterrupt

    def loss(net: nn.Module, indices: torch.Tensor, training: bool) -> torch.Tensor:
        return (net(torch.ones(len(indices), 1))[:, 0] - 3.0) ** 2

    config = FitConfig(batch_size=5, learning_rate=0.05)
    with pytest.raises(KeyboardInterrupt):
        fit_network(net, loss, torch.arange(20), torch.arange(5), config, interrupt)
    value = float(loss(net, torch.arange(1), False).detach())
    assert value == pytest.approx(min(seen), abs=1e-6)
    assert value < seen[0]

"""Several flows by one pass have the densities that they have one after the other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from sbi.neural_nets import likelihood_nn

from sbi_jeffreys.networks.affine import with_fast_affine_layers
from sbi_jeffreys.networks.at_once import FlowsAtOnce
from sbi_jeffreys.proxies.experts.gaussian import AroundRegression, GaussianRegression
from sbi_jeffreys.proxies.folds import Bag


def flows(num: int, dim: int, dim_z: int, model: str = "maf", **settings):
    """Flows whose weights, standardisations and permutations all differ."""
    made = []
    for k in range(num):
        z, y = (k + 1) * torch.randn(80, dim_z) + k, torch.randn(80, dim) / (k + 1) - k
        net = with_fast_affine_layers(likelihood_nn(model, **settings)(z, y)).eval()
        for parameter in net.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        made.append(net.requires_grad_(False))
    return made


def one_by_one(nets, y, z):
    return torch.stack([net.log_prob(y.unsqueeze(0), z)[0] for net in nets])


@pytest.mark.parametrize(
    ("num", "dim", "dim_z", "rows", "settings"),
    [
        (3, 4, 2, 7, {}),
        (2, 2, 1, 600, {"num_transforms": 2}),
        (1, 5, 3, 1, {"hidden_features": 20}),
        (4, 1, 2, 30, {"num_transforms": 1}),
    ],
)
def test_the_densities_are_the_same(num, dim, dim_z, rows, settings):
    torch.manual_seed(0)
    nets = flows(num, dim, dim_z, **settings)
    y, z = torch.randn(rows, dim), torch.randn(rows, dim_z)
    found = FlowsAtOnce.of(nets).log_prob(y, z)
    torch.testing.assert_close(found, one_by_one(nets, y, z), rtol=1e-4, atol=1e-4)


def test_each_flow_can_have_rows_of_its_own():
    torch.manual_seed(0)
    nets = flows(3, 4, 2)
    y, z = torch.randn(3, 300, 4), torch.randn(300, 2)
    expected = torch.stack([net.log_prob(own.unsqueeze(0), z)[0] for net, own in zip(nets, y)])
    torch.testing.assert_close(FlowsAtOnce.of(nets).log_prob(y, z), expected, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_rows_and_conditions_is_the_same():
    torch.manual_seed(0)
    nets = [net.double() for net in flows(3, 4, 2)]
    y, z = torch.randn(6, 4).double().requires_grad_(), torch.randn(6, 2).double().requires_grad_()
    bag = Bag(nets)
    found = torch.autograd.grad(bag.log_prob(y.unsqueeze(0), z).sum(), (y, z))
    assert bag._flows is not None
    mean = torch.logsumexp(one_by_one(nets, y, z), dim=0)
    expected = torch.autograd.grad(mean.sum(), (y, z))
    torch.testing.assert_close(found, expected)


def test_flows_of_another_kind_are_not_taken():
    torch.manual_seed(0)
    z, y = torch.randn(80, 2), torch.randn(80, 3)
    maf = flows(1, 3, 2)[0]
    untouched = likelihood_nn("maf")(z, y)
    relu = copy.deepcopy(maf)
    for part in relu.modules():
        if hasattr(part, "activation"):
            part.activation = torch.relu
    dropout = copy.deepcopy(maf)
    for part in dropout.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.1
    others = [
        likelihood_nn("nsf")(z, y),
        likelihood_nn("maf_rqs")(z, y),
        likelihood_nn("maf", z_score_theta="none")(z, y),
        likelihood_nn("mdn")(z, y),
        untouched,
        relu,
        dropout,
        flows(1, 3, 2, hidden_features=20)[0],
        flows(1, 3, 2, num_transforms=3)[0],
        torch.nn.Linear(2, 3),
    ]
    for other in others:
        assert FlowsAtOnce.of([maf, other]) is None
    assert FlowsAtOnce.of([maf, maf]) is not None


@pytest.mark.parametrize("around", [False, True])
def test_a_bag_is_the_mixture_of_its_flows(around):
    torch.manual_seed(0)
    nets = flows(3, 4, 2)
    if around:
        pairs = [(torch.randn(90, 2), torch.randn(90, 4)) for _ in nets]
        regressions = [GaussianRegression(2, 4, 1).fit(*own) for own in pairs]
        nets = [AroundRegression(net, own) for net, own in zip(nets, regressions)]
    bag = Bag(nets)
    y, z = torch.randn(5, 7, 4), torch.randn(7, 2)
    expected = torch.stack([net.log_prob(y, z) for net in nets]).exp().mean(dim=0).log()
    torch.testing.assert_close(bag.log_prob(y, z), expected, rtol=1e-4, atol=1e-4)
    assert bag._flows is not None


def test_a_bag_notices_that_its_weights_have_changed():
    torch.manual_seed(0)
    bag, other = Bag(flows(3, 4, 2)), Bag(flows(3, 4, 2))
    y, z = torch.randn(1, 7, 4), torch.randn(7, 2)
    before = bag.log_prob(y, z)
    bag.load_state_dict(other.state_dict())
    torch.testing.assert_close(bag.log_prob(y, z), other.log_prob(y, z))
    assert not torch.allclose(bag.log_prob(y, z), before)
    twice = bag.double().log_prob(y.double(), z.double())
    torch.testing.assert_close(twice.float(), other.log_prob(y, z), rtol=1e-4, atol=1e-4)


def test_a_bag_that_is_trained_has_the_gradient_of_its_weights():
    torch.manual_seed(0)
    bag = Bag(flows(2, 3, 2)).requires_grad_(True)
    y, z = torch.randn(1, 7, 3), torch.randn(7, 2)
    with torch.no_grad():
        bag.log_prob(y, z)
    bag.log_prob(y, z).sum().backward()
    assert all(p.grad is not None for p in bag.parameters() if p.requires_grad)


def test_copies_of_a_bag_do_not_carry_a_second_set_of_weights():
    torch.manual_seed(0)
    bag = Bag(flows(2, 3, 2))
    y, z = torch.randn(1, 7, 3), torch.randn(7, 2)
    expected = bag.log_prob(y, z)
    for again in (copy.deepcopy(bag), pickle.loads(pickle.dumps(bag))):
        assert again._flows is None
        torch.testing.assert_close(again.log_prob(y, z), expected)


def test_a_bag_of_other_nets_takes_them_one_by_one():
    torch.manual_seed(0)
    nets = [likelihood_nn("nsf")(torch.randn(80, 2), torch.randn(80, 3)) for _ in range(2)]
    bag = Bag(nets)
    y, z = torch.randn(2, 7, 3), torch.randn(7, 2)
    expected = torch.stack([net.log_prob(y, z) for net in nets]).exp().mean(dim=0).log()
    torch.testing.assert_close(bag.log_prob(y, z), expected, rtol=1e-4, atol=1e-4)
    assert bag._flows is None

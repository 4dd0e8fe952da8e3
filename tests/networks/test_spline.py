"""The closed-form spline is nflows', to rounding: values, both derivatives, tails."""

import copy
import pickle

import pytest
import torch
from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform
from sbi.neural_nets import posterior_nn

from sbi_jeffreys import JeffreysOptions, NPE_Jeffreys, RegressionExpert
from sbi_jeffreys.networks.spline import FastSplineCoupling, Spline, with_fast_splines

SPLINE = Spline(num_bins=6, tail_bound=2.5, min_derivative=1e-2, scale=0.3)


def _points(num=400, bins=6, dtype=torch.float64):
    """Inputs in every bin, at the edges and outside; steep parameters."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(num, generator=generator, dtype=dtype)
    x[:4] = torch.tensor([-2.5, 2.5, 0.0, 7.0], dtype=dtype)
    return x, 4 * torch.randn(num, 3 * bins - 1, generator=generator, dtype=dtype)


def _with_gradients(function, x, parameters, inverse):
    """Values, log dets, and the gradients of a weighted sum of both."""
    x, parameters = x.clone().requires_grad_(), parameters.clone().requires_grad_()
    outputs, log_det = function(x, parameters, inverse)
    weights = torch.linspace(-1, 2, len(x), dtype=x.dtype)
    total = (weights * outputs).sum() + (weights.flip(0) * log_det).sum()
    return outputs.detach(), log_det.detach(), *torch.autograd.grad(total, (x, parameters))


@pytest.mark.parametrize("inverse", [False, True])
def test_it_is_the_spline_of_nflows(inverse):
    x, parameters = _points()
    ours = _with_gradients(SPLINE, x, parameters, inverse)
    theirs = _with_gradients(SPLINE.by_nflows, x, parameters, inverse)
    for name, a, b in zip(("value", "log det", "by x", "by parameters"), ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_are_those_of_the_values(inverse):
    x, parameters = _points(num=12)
    inside = (x.abs() < 2.4).nonzero().squeeze(-1)[:5]  # finite differences do not cross the edge
    arguments = x[inside].requires_grad_(), parameters[inside].requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: SPLINE(*a, inverse), arguments)
    assert torch.autograd.gradgradcheck(lambda *a: SPLINE(*a, inverse), arguments)
    for k in range(2):  # and where one of both is constant
        one = [a if j == k else a.detach() for j, a in enumerate(arguments)]
        assert torch.autograd.gradgradcheck(lambda *a, inverse=inverse: SPLINE(*a, inverse), one)


def test_the_log_det_is_that_of_the_map():
    x, parameters = _points()
    x = x.requires_grad_()
    outputs, log_det = SPLINE(x, parameters)
    (derivative,) = torch.autograd.grad(outputs.sum(), x)
    torch.testing.assert_close(derivative.log(), log_det.detach(), rtol=1e-9, atol=1e-9)


def test_the_inverse_undoes_it_in_single_precision():
    x, parameters = _points(dtype=torch.float32)
    y, log_det = SPLINE(x, parameters)
    back, inverse_log_det = SPLINE(y, parameters, inverse=True)
    # An error of 1e-6 in y is one of up to 1e-6 / (dy/dx) in x.
    steepness = torch.exp(-log_det).clamp_min(1.0)
    assert float(((back - x).abs() / steepness).max()) < 5e-6
    assert float((log_det + inverse_log_det).abs().median()) < 1e-5


def test_outside_it_is_the_identity_and_nan_stays_where_it_is():
    x = torch.tensor([9.0, -3.0, torch.nan, 0.1]).requires_grad_()
    parameters = torch.randn(4, 17).requires_grad_()
    y, log_det = SPLINE(x, parameters)
    assert y[:2].tolist() == [9.0, -3.0]
    assert y[2].isnan()
    assert log_det[:3].tolist() == [0.0, 0.0, 0.0]
    gradient = torch.autograd.grad(y[[0, 1, 3]].sum() + log_det.sum(), parameters)[0]
    assert (gradient[:3] == 0).all()
    assert bool(gradient[3].isfinite().all())
    assert (gradient[3] != 0).any()


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_a_flow_is_the_same_with_it(dim):
    torch.manual_seed(0)
    theta, x = torch.randn(200, dim), torch.randn(200, 3)
    net = posterior_nn("nsf")(theta, x)
    fast = with_fast_splines(copy.deepcopy(net))
    layers = [m for m in fast.modules() if isinstance(m, FastSplineCoupling)]
    assert len(layers) == 5
    assert not any(isinstance(m, FastSplineCoupling) for m in net.modules())
    assert list(fast.state_dict()) == list(net.state_dict())
    for a, b in zip(*(_loss_and_gradients(n, theta, x) for n in (net, fast))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    drawn = []
    for n in (net, fast):
        torch.manual_seed(1)
        drawn.append(n.sample(torch.Size((50,)), x[:4]))
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-3)


def _loss_and_gradients(net, theta, x):
    net.zero_grad()
    loss = net.loss(theta, x).mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in net.parameters() if p.requires_grad)]


def test_what_is_not_such_a_spline_is_left_alone():
    theta, x = torch.randn(50, 2), torch.randn(50, 3)
    bounded = PiecewiseRationalQuadraticCouplingTransform(
        [0, 1], lambda i, o: torch.nn.Linear(i, o)
    )
    for net in (posterior_nn("maf")(theta, x), bounded):
        kinds = [type(m) for m in net.modules()]
        assert [type(m) for m in with_fast_splines(net).modules()] == kinds


def test_the_main_has_it_and_can_be_pickled():
    torch.manual_seed(0)
    prior = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    theta = prior.sample((60,))
    options = JeffreysOptions(proxy_folds=1, experts=(RegressionExpert(1),))
    inference = NPE_Jeffreys(prior, show_progress_bars=False, options=options)
    net = inference.append_simulations(theta, theta).train(
        max_num_epochs=1, show_train_summary=False
    )
    assert sum(isinstance(m, FastSplineCoupling) for m in net.modules()) == 5
    again = pickle.loads(pickle.dumps(net))
    assert torch.equal(
        again.log_prob(theta[:1, None], theta[:1]), net.log_prob(theta[:1, None], theta[:1])
    )

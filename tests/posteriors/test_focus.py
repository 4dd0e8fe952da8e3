"""Focusing at one observation: towards the exact posterior, and never to a worse one."""

import pickle

import pytest
import torch
from contract_tools import X_O, fresh, trained
from known_posteriors import PRIOR, SPREAD, Known, gaussian, log_likelihood, two_modes
from sbi.neural_nets import posterior_nn
from sbi.utils import BoxUniform
from torch.distributions import Normal

from sbi_jeffreys import GivenProxy, JeffreysWarning
from sbi_jeffreys.objective import forward_term
from sbi_jeffreys.posteriors.focused import _loss, _refined, _Target, focus

X = torch.tensor([0.5, -1.0])
MEAN = X / 1.25


@pytest.fixture(scope="module")
def rough():
    """A flow after a few steps: roughly the prior, whatever x is."""
    torch.manual_seed(0)
    theta, x = PRIOR.sample((500,)), torch.randn(500, 2)
    net = posterior_nn("maf", hidden_features=20, num_transforms=2)(theta, x)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(30):
        optimizer.zero_grad()
        net.loss(theta, x).mean().backward()
        optimizer.step()
    return net.eval()


def focused(main, power=1.0, num_steps=200, x=X, learning_rate=5e-3):
    proxy = GivenProxy(PRIOR, log_likelihood)
    return focus(main, proxy, PRIOR, x, power, num_steps, learning_rate, False)


@pytest.fixture(scope="module")
def posterior(rough):
    return focused(rough)


def test_it_is_the_exact_posterior(posterior):
    """Errors of 4,000 draws are 1.6 % of a standard deviation, those of the flow below 10 %."""
    drawn = posterior.sample((4_000,), show_progress_bars=False)
    assert float(((drawn.mean(0) - MEAN) / SPREAD).abs().max()) < 0.1
    assert float((drawn.std(0) / SPREAD - 1).abs().max()) < 0.1
    assert posterior.focus.kept
    assert posterior.focus.before.effective_sample_size < 0.4
    assert posterior.focus.after.effective_sample_size > 0.9
    exact = Normal(MEAN, SPREAD).log_prob(drawn[:100]).sum(-1)
    assert float((posterior.log_prob(drawn[:100]) - exact).abs().mean()) < 0.15


def test_the_target_is_the_pool(rough):
    """With power ½ the variance is between those of main and proxy."""
    drawn = focused(rough, power=0.5).sample((4_000,), show_progress_bars=False)
    assert float(drawn.std(0).min()) > 1.15 * SPREAD


def test_the_trained_main_stays_as_it_was(rough):
    before = {name: weight.clone() for name, weight in rough.state_dict().items()}
    focused(rough, num_steps=20)
    assert all(torch.equal(weight, before[name]) for name, weight in rough.state_dict().items())


def test_it_is_a_posterior_of_sbi(posterior):
    assert torch.allclose(posterior.map(num_iter=200, show_progress_bars=False)[0], MEAN, atol=0.1)
    twin = pickle.loads(pickle.dumps(posterior))
    theta = torch.zeros(1, 2)
    assert torch.equal(twin.log_prob(theta), posterior.log_prob(theta, x=X))
    assert posterior.sample((5,), X, 1_000, False).shape == (5, 2)  # by position, as of sbi
    assert torch.equal(posterior.log_prob(theta, X, False), posterior.log_prob(theta))
    assert "refined" in str(posterior.focus)


def test_it_keeps_its_observation_when_it_is_moved(rough):
    prior = BoxUniform(-5 * torch.ones(2), 5 * torch.ones(2))
    moved = focus(rough, GivenProxy(prior, log_likelihood), prior, X, 1.0, 1, 1e-3, False)
    moved.to("cpu")
    assert torch.equal(moved.x_o, X.unsqueeze(0))
    with pytest.raises(ValueError, match="focused at"):
        moved.set_default_x(X + 1)


def test_another_observation_is_refused(posterior):
    with pytest.raises(ValueError, match="focused at"):
        posterior.sample((10,), x=X + 1)
    with pytest.raises(ValueError, match="focused at"):
        posterior.log_prob(torch.zeros(1, 2), x=X + 1)
    with pytest.raises(ValueError, match="focused at"):
        posterior.set_default_x(X + 1)
    with pytest.raises(NotImplementedError):
        posterior.sample_batched((10,), x=torch.zeros(2, 2))


def test_a_main_that_is_not_improved_is_handed_out_as_it_was(posterior):
    """The focused main is exact already; a step size that wrecks it must not be handed out."""
    again = focused(posterior.posterior_estimator, num_steps=5, learning_rate=1.0)
    assert not again.focus.kept
    theta = torch.randn(50, 2)
    assert torch.equal(again.log_prob(theta), posterior.log_prob(theta))


def test_the_best_weights_are_kept_not_the_last(rough, monkeypatch):
    target = _Target(rough, GivenProxy(PRIOR, log_likelihood), X.unsqueeze(0), 1.0)
    drawn, _ = target.draws()
    values = iter([1.0, 0.5, 2.0])  # before, after 50 steps, after 100
    monkeypatch.setattr("sbi_jeffreys.posteriors.focused._forward", lambda *_: next(values))
    torch.manual_seed(1)
    refined = _refined(rough, target, drawn, 100, 5e-3, False)
    values = iter([1.0, 2.0, 0.5])
    torch.manual_seed(1)
    longer = _refined(rough, target, drawn, 100, 5e-3, False)
    theta = torch.zeros(1, 1, 2)
    gap = refined.log_prob(theta, target.x_o) - longer.log_prob(theta, target.x_o)
    assert float(gap.abs()) > 1e-4


def test_the_reverse_half_is_in_the_loss():
    """A main that misses half of the mass: R is what sees the gap between its draws and target."""
    main = Known(gaussian(scale=2.0))
    target = _Target(main, GivenProxy(PRIOR, log_likelihood), X.unsqueeze(0), 1.0)
    fit = MEAN + SPREAD * torch.randn(2_000, 1, 2)
    forward = float(forward_term(main.log_prob(fit, X.unsqueeze(0))))
    losses = torch.stack([_loss(main, target, fit) for _ in range(20)])
    assert float(losses.mean()) > forward + 0.5


def test_both_modes_are_kept():
    """|x| hides the sign: a main with both modes, one too heavy, gets the weights of the target."""

    def hidden(theta, x):
        return torch.logaddexp(log_likelihood(theta, x), log_likelihood(theta, -x))

    main = Known(two_modes(0.9))
    target = _Target(main, GivenProxy(PRIOR, hidden), X.unsqueeze(0), 1.0)
    drawn, effective = target.draws()
    share = float((drawn[:, 0] @ MEAN > 0).float().mean())
    assert effective > 500
    assert abs(share - 0.5) < 0.05


def test_an_observation_with_an_unknown_target_is_not_focused_at(rough):
    """A likelihood with support on a sliver that no draw hits."""

    def sliver(theta, x):
        inside = (theta - 3.0).abs().amax(-1) < 1e-4
        return torch.where(inside, 0.0, -torch.inf)

    with pytest.warns(JeffreysWarning, match="not focused"):
        found = focus(rough, GivenProxy(PRIOR, sliver), PRIOR, X, 1.0, 20, 1e-3, False)
    assert not found.focus.kept


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("x_o", torch.zeros(3), ValueError),
        ("x_o", torch.full((2,), float("nan")), ValueError),
        ("x_o", "x", TypeError),
        ("num_steps", 0, ValueError),
        ("num_steps", 1.5, TypeError),
        ("learning_rate", -1.0, ValueError),
        ("learning_rate", "small", TypeError),
        ("power", 0.0, ValueError),
        ("power", 1.5, ValueError),
        ("show_progress_bars", "no", TypeError),
    ],
)
def test_bad_arguments_are_named(trainer, argument, value, error):
    with pytest.raises(error, match="observation|^x " if argument == "x_o" else argument):
        trainer.focus(**({"x_o": X_O} | {argument: value}))


def test_the_trainer_focuses(trainer):
    found = trainer.focus(X_O, num_steps=20)
    assert found.sample((10,), show_progress_bars=False).shape[0] == 10


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_does_not_matter(trainer, mode):
    with mode():
        focused = trainer.focus(X_O + 0.0, num_steps=2)
        assert bool(focused.sample((2,), show_progress_bars=False).isfinite().all())


def test_without_a_proxy_there_is_nothing_to_focus_with():
    with pytest.raises(RuntimeError, match="train"):
        fresh().focus(X_O)


@pytest.fixture(scope="module")
def trainer():
    torch.manual_seed(0)
    return trained()


def test_no_draw_is_both_fitted_to_and_judged_by(rough):
    torch.manual_seed(0)
    target = _Target(rough, GivenProxy(PRIOR, log_likelihood), X.unsqueeze(0), 1.0)
    drawn, _ = target.draws()
    fit, judge = ({tuple(row) for row in half[:, 0].tolist()} for half in drawn.chunk(2))
    assert len(fit) > 100
    assert not fit & judge

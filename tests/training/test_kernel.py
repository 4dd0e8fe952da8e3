"""The calibration kernel: its scale has no meaning, and pairs that it excludes decide nothing."""

import math
from dataclasses import replace

import pytest
import torch
from contract_tools import PRIOR, TINY, fresh, simulate, train
from torch import Tensor
from torch.distributions import Normal

from sbi_jeffreys import GivenProxy, JeffreysWarning, NPE_Jeffreys
from sbi_jeffreys.diagnostics.calibration import mean_and_error
from sbi_jeffreys.objective import forward_term
from sbi_jeffreys.training import data
from sbi_jeffreys.training.held_out import HeldOut
from sbi_jeffreys.training.report import Kept, Problem, ProxyStatus


class Shifted:
    """The log-likelihood of the simulator, `shift` off."""

    def __init__(self, shift: float) -> None:
        self.shift = shift

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        return Normal(theta + self.shift, 0.3).log_prob(x).sum(-1)


def fitted(kernel, shift: float, num: int = 100) -> NPE_Jeffreys:
    torch.manual_seed(1)
    options = replace(TINY, proxy=GivenProxy(PRIOR, Shifted(shift)), min_trust=0.05)
    inference = fresh(options=options).append_simulations(*simulate(num))
    train(inference, 10, calibration_kernel=kernel, clip_max_norm=None)  # it depends on the scale
    return inference


@pytest.mark.parametrize(
    ("shift", "used"), [pytest.param(0.6, True, marks=pytest.mark.slow), (1.5, False)]
)
def test_the_scale_of_the_kernel_does_not_decide_the_trust(shift: float, used: bool):
    plain = fitted(None, shift).training_report
    assert (plain.proxy_status is ProxyStatus.USED) == used
    assert plain.trust < 0.9
    for scale in (0.01, 1.0, 100.0):
        found = fitted(lambda x, c=scale: torch.full((len(x),), c), shift).training_report
        assert found.trust == pytest.approx(plain.trust, abs=0.03)
        assert found.proxy_status is plain.proxy_status
        assert (found.npe == plain.npe) == (scale == 1.0)  # to the digit: ones are no kernel


def test_a_kernel_that_excludes_every_held_out_pair_leaves_plain_npe():
    """The proxy is exact, so that the same training without a kernel uses it."""
    inference = fitted(None, 0.0)
    assert inference.training_report.proxy_status is ProxyStatus.USED
    held_out = inference.get_simulations()[1][inference.val_indices]

    def elsewhere(x: Tensor) -> Tensor:
        return 1.0 - (x.unsqueeze(1) == held_out).all(dim=2).any(dim=1).float()

    torch.manual_seed(1)
    again = fresh(options=inference.options).append_simulations(*simulate(100))
    with pytest.warns(JeffreysWarning, match=r"every held-out simulation.*calibration_kernel"):
        again.train(max_num_epochs=10, calibration_kernel=elsewhere)
    assert torch.equal(again.val_indices, inference.val_indices)
    report = again.training_report
    assert report.proxy_status is ProxyStatus.NO_KERNEL_WEIGHT
    assert report.problems == (Problem.KERNEL,)
    assert report.kept is Kept.PLAIN_NPE
    assert report.space is None  # nothing to choose it by


@pytest.mark.slow
@pytest.mark.full_reading
def test_everything_that_is_reported_is_weighted_by_the_kernel():
    def kernel(x: Tensor) -> Tensor:
        return 7.0 * (x[:, 0] > 0)

    inference = fitted(kernel, 0.0, num=400)
    symmetric, report = inference._training.symmetric, inference.training_report
    theta, x = (t[inference.val_indices] for t in inference.get_simulations()[:2])
    used = x[:, 0] > 0
    with torch.no_grad():
        losses = -inference._neural_net.log_prob(theta.unsqueeze(0), x)[0]
    expected = mean_and_error(losses[used])
    assert (report.main.value, report.main.error) == pytest.approx(expected)
    assert inference.summary["best_validation_loss"][-1] == pytest.approx(expected[0], abs=1e-5)
    assert report.gap.value == pytest.approx(report.main.value - report.proxy_held_out.value)
    # So are the standard errors by which weights are kept: excluded pairs may be anything.
    assert symmetric._error(torch.where(used, losses, torch.inf)) == pytest.approx(expected[1])


def test_the_forward_term_is_weighted_in_the_units_of_the_held_out_values(monkeypatch):
    seen, original = [], data.real_batches

    def spied(*arguments):
        batches = original(*arguments)

        def next_real():
            seen.append(batches())
            return seen[-1]

        return next_real

    def kernel(x: Tensor) -> Tensor:
        return 100.0 * (1 + (x[:, 0] > 0))

    monkeypatch.setattr(data, "real_batches", spied)
    inference = fitted(kernel, 0.0)
    scale = kernel(inference.get_simulations()[1][inference.val_indices]).mean()
    assert seen
    for _, x, weights in seen:
        torch.testing.assert_close(weights, kernel(x) / scale)


def test_pairs_that_the_kernel_excludes_may_have_no_density():
    losses, weights = torch.tensor([1.0, math.inf, 2.0]), torch.tensor([1.0, 0.0, 2.0])
    held_out = HeldOut(torch.zeros(3, 1), torch.zeros(3, 1), weights)
    assert held_out.mean(losses) == pytest.approx(5 / 3)
    assert float(forward_term(-losses, weights)) == pytest.approx(5 / 3)
    assert mean_and_error(losses, weights)[0] == pytest.approx(5 / 3)
    nothing = HeldOut(torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3))
    assert nothing.excluded
    assert nothing.mean(torch.zeros(3)) == math.inf


def test_weighted_errors():
    torch.manual_seed(0)
    values = torch.randn(400, 50)
    weights = torch.rand(400, 50) ** 2
    found = torch.tensor([mean_and_error(v, w) for v, w in zip(values, weights)])
    assert float(found[:, 1].mean()) == pytest.approx(float(found[:, 0].std()), rel=0.12)
    some = (weights > 0.3).float()
    chosen = values[0][some[0] > 0]
    assert mean_and_error(values[0], 5 * some[0]) == pytest.approx(mean_and_error(chosen))
    assert mean_and_error(values[0], torch.full((50,), 0.1)) == mean_and_error(values[0])
    one = mean_and_error(torch.arange(3.0), torch.tensor([0.0, 2.0, 0.0]))
    assert one[0] == 1.0
    assert math.isnan(one[1])


def test_the_temperature_is_not_surer_for_pairs_that_the_kernel_excludes(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "sbi_jeffreys.training.held_out.inverse_temperature",
        lambda evidence, optimistic: seen.extend(evidence),
    )
    weights = torch.tensor([0.0, 0.0, 2.0, 2.0])
    held_out = HeldOut(torch.randn(4, 2), torch.randn(4, 2), weights, atomic=True)
    held_out.inverse_temperature(GivenProxy(PRIOR, Shifted(0.0)), None)  # type: ignore[arg-type]
    assert seen[0].weights.tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("atomic", [False, True])
def test_held_out_pairs_are_not_embedded_all_at_once(atomic: bool):
    class Main(torch.nn.Module):
        embedding_net = None

        def log_prob(self, theta: Tensor, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return Normal(x, 1.0).log_prob(theta).sum(-1)

    sizes: list[int] = []
    theta, x = simulate(500)
    held_out = HeldOut(theta, x, torch.ones(500), atomic)
    main, proxy = Main(), GivenProxy(PRIOR, Shifted(0.0))
    losses = held_out.main_losses(main, proxy)  # type: ignore[arg-type]
    assert losses.shape == (500,)
    assert max(sizes) <= 200
    if not atomic:
        torch.testing.assert_close(losses, -Normal(x, 1.0).log_prob(theta).sum(-1))

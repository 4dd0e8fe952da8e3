"""The symmetric stage starts from plain NPE with what the proxy knows; plain NPE stays as it is."""

from dataclasses import replace

import pytest
import torch
from contract_tools import PRIOR, TINY, fresh, train, trained
from torch import nn

from sbi_jeffreys import MainBuilder, NPE_Jeffreys, RegressionExpert
from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.networks.standardised import StandardisedInput
from sbi_jeffreys.training.held_out import HeldOut
from sbi_jeffreys.training.report import Kept
from sbi_jeffreys.training.symmetric import SymmetricTraining

WIDE = replace(TINY, experts=(RegressionExpert(1),), num_steps=12, steps_per_epoch=4)


def wide() -> NPE_Jeffreys:
    """A trainer with 40 outputs, of which two depend on θ."""
    theta, x = PRIOR.sample((300,)), torch.randn(300, 40)
    x[:, :2] += 4 * theta
    return fresh(options=WIDE).append_simulations(theta, x)


def used(inference: NPE_Jeffreys) -> int:
    """How many outputs the main looks at."""
    parts = inference._training.stage.main.modules()
    return next(int(part.used.sum()) for part in parts if isinstance(part, StandardisedInput))


def test_a_restart_while_plain_npe_is_best_leaves_out_the_same_outputs(monkeypatch):
    inference, seen = wide(), []

    def diverged_once(self, *arguments):
        seen.append(used(inference))
        return len(seen) == 1

    monkeypatch.setattr(SymmetricTraining, "_diverged", diverged_once)
    monkeypatch.setattr(SymmetricTraining, "keep", lambda *arguments: None)
    train(inference, 3)
    assert inference.training_report.restarts == 1
    assert seen == [2, 2, 2]
    assert used(inference) == 40  # plain NPE was kept


@pytest.mark.parametrize("kept", [Kept.PLAIN_NPE, Kept.BEST])
def test_a_restart_goes_back_to_the_best_weights_or_the_start(kept):
    inference = trained(max_num_epochs=1)  # the stage is paused
    symmetric = inference._training.symmetric
    assert symmetric.start is not None
    shifted = {
        name: value + 1.0 if value.is_floating_point() else value
        for name, value in symmetric.start.items()
    }
    symmetric.best = replace(symmetric.best, weights=shifted, kept=kept)
    symmetric.stage.step = symmetric.stage.num_steps - 1
    assert symmetric._restart()
    assert symmetric.stage.step == 0  # with a warm-up
    expected = symmetric.start if kept is Kept.PLAIN_NPE else shifted
    for name, value in symmetric.stage.main.state_dict().items():
        assert torch.equal(value, expected[name])


def test_before_the_stage_runs_the_main_is_plain_npe(monkeypatch):
    """In a checkpoint, or after an interrupt; what goes on from there starts with the changes."""

    def interrupted(*arguments):
        raise KeyboardInterrupt

    inference = wide()
    with monkeypatch.context() as patch:
        patch.setattr(SymmetricTraining, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(inference, 3)
    best = inference._training.symmetric.best.weights
    for name, value in inference._neural_net.state_dict().items():
        assert torch.equal(value, best[name])
    assert used(inference) == 40
    inference._training.symmetric.resume()
    assert used(inference) == 2


def test_the_coverage_before_is_that_of_plain_npe(monkeypatch):
    """The energy has trained the embedding net further, which the main gets for the stage alone."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    fit = FitConfig(max_epochs=30, learning_rate=3e-2)
    options = replace(TINY, energy=replace(TINY.energy, num_nets=1, fit=fit), proxy="energy")
    inference, seen = fresh(MainBuilder("maf", embedding_net=net), options), []
    original = HeldOut.coverage

    def coverage(self, main, prior):
        seen.append(self.main_losses(main))
        return original(self, main, prior)

    monkeypatch.setattr(HeldOut, "coverage", coverage)
    theta = PRIOR.sample((100,))
    x = theta.mean(dim=1)[:, None, None, None] + 0.3 * torch.randn(100, 1, 4, 4)
    train(inference.append_simulations(theta, x), 40)
    symmetric = inference._training.symmetric
    plain = inference._best_model_state_dict
    assert any(not torch.equal(value, plain[name]) for name, value in symmetric.start.items())
    assert torch.equal(seen[0], symmetric.plain)
    assert inference.training_report.coverage_before is symmetric.coverage_before

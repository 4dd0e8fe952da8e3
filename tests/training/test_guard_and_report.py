"""The guard against divergence, the report with its warnings, and checkpoints."""

import os
import signal
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace

import pytest
import torch
from contract_tools import PRIOR, TINY, X_O, fresh, simulate, train, trained, weights

from sbi_jeffreys import GivenProxy, JeffreysWarning, NPE_Jeffreys
from sbi_jeffreys.training import conclusion, own_space, symmetric
from sbi_jeffreys.training.held_out import HeldOut
from sbi_jeffreys.training.report import Kept, Problem, ProxyStatus, StageStatus
from sbi_jeffreys.training.stage import SymmetricStage

STEPS = replace(TINY, num_steps=40, steps_per_epoch=4)


def diverging(monkeypatch, from_epoch: int, excess: float, epochs: int = 1) -> None:
    """Held-out losses of the main that are `excess` nats for some epochs of the stage, else 0."""
    calls = [0]

    def losses(self, main, proxy=None):
        calls[0] += 1
        # The first call evaluates plain NPE, before the stage.
        wrong = from_epoch <= calls[0] - 1 < from_epoch + epochs
        return torch.full((len(self.theta),), excess * wrong)

    monkeypatch.setattr(HeldOut, "main_losses", losses)


def test_one_divergence_goes_back_to_the_best_weights_at_a_third_of_the_step(monkeypatch):
    diverging(monkeypatch, 2, 30.0)
    inference = fresh(options=STEPS).append_simulations(*simulate(200))
    train(inference, 20)
    report, stage = inference.training_report, inference._training.stage
    assert report.restarts == 1
    assert report.stage_status is StageStatus.FINISHED
    assert stage.peak_learning_rate == pytest.approx(30 * 5e-4 / 3)
    assert Problem.STAGE_STOPPED not in report.problems


def test_three_divergences_stop_the_stage_with_a_warning_and_the_best_weights(monkeypatch):
    diverging(monkeypatch, 2, 30.0, epochs=100)
    monkeypatch.setattr(own_space, "_MARGIN", float("inf"))
    inference = fresh(options=STEPS).append_simulations(*simulate(200))
    with pytest.warns(JeffreysWarning, match=r"diverged and was stopped.*learning_rate_factor"):
        inference.train(max_num_epochs=20)
    report, best = inference.training_report, inference._training.symmetric.best
    assert report.stage_status is StageStatus.STOPPED
    assert report.restarts == 2
    for name, value in inference._neural_net.state_dict().items():
        assert torch.equal(value, best.weights[name])
    before = weights(inference)
    train(inference, 20, resume_training=True)  # a stopped stage stays stopped
    assert torch.equal(before, weights(inference))


def test_without_the_guard_a_divergence_goes_on(monkeypatch):
    """What the guard is worth: the same run with an infinite bound never goes back."""
    for name in ("_EXCESS_EARLY", "_EXCESS_LATE"):
        monkeypatch.setattr(symmetric, name, float("inf"))
    diverging(monkeypatch, 2, 30.0, epochs=100)
    inference = fresh(options=STEPS).append_simulations(*simulate(200))
    train(inference, 20)
    assert inference.training_report.restarts == 0


@pytest.mark.parametrize(("epoch", "restarts"), [(2, 0), (8, 1)])
def test_a_small_excess_is_forgiven_early_only(monkeypatch, epoch, restarts):
    diverging(monkeypatch, epoch, 2.0)
    inference = fresh(options=STEPS).append_simulations(*simulate(400))
    train(inference, 30)
    assert inference.training_report.restarts == restarts


def wrong_likelihood(theta, x):
    return -((x - theta - 0.6) ** 2).sum(-1) / (2 * 0.05**2)


def test_a_refused_proxy_warns_in_training_and_again_where_draws_are_corrected_to_it():
    options = replace(TINY, proxy=GivenProxy(PRIOR, wrong_likelihood), min_trust=0.3)
    inference = fresh(options=options).append_simulations(*simulate(200))
    with pytest.warns(JeffreysWarning, match=r"falls back to plain NPE"):
        inference.train(max_num_epochs=20)
    report = inference.training_report
    assert report.proxy_status is ProxyStatus.UNTRUSTED
    assert report.kept is Kept.PLAIN_NPE
    assert report.problems == (Problem.PROXY_REFUSED,)
    with pytest.warns(JeffreysWarning, match="a proxy that training refused"):
        inference.build_corrected_posterior(power=1.0)


def sharp_likelihood(theta, x):
    return -((x - theta) ** 2).sum(-1) / (2 * 0.3**2)


def test_a_main_that_cannot_follow_is_reported_with_the_gap():
    """Four steps cannot follow the exact likelihood; the report says by how much."""
    options = replace(TINY, proxy=GivenProxy(PRIOR, sharp_likelihood))
    inference = fresh(options=options).append_simulations(*simulate(400))
    with pytest.warns(JeffreysWarning, match=r"behind its proxy on .* by .* nats"):
        inference.train(max_num_epochs=2)
    report = inference.training_report
    assert report.gap.value == pytest.approx(report.main.value - report.proxy_held_out.value)
    assert report.gap.value > 0.5


def test_skipped_steps_are_counted_and_warned_of(monkeypatch):
    from sbi_jeffreys.training.loss import SymmetricLoss

    original = SymmetricLoss.__call__

    def broken(self, step, multiplier, next_real):
        loss, terms = original(self, step, multiplier, next_real)
        return (loss * float("nan") if step == 1 else loss), terms

    monkeypatch.setattr(SymmetricLoss, "__call__", broken)
    inference = fresh().append_simulations(*simulate())
    with pytest.warns(JeffreysWarning, match=r"skipped.*\(1 steps\)"):
        inference.train(max_num_epochs=2)


@pytest.mark.slow
def test_a_clean_training_warns_of_nothing_and_says_what_it_did(capsys):
    torch.manual_seed(0)
    theta, x = simulate(500)
    inference = NPE_Jeffreys(PRIOR, "maf", options=replace(TINY, num_steps=200, proxy_draws=20_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error", JeffreysWarning)
        inference.append_simulations(theta, x).train()
    report = inference.training_report
    assert report.problems == ()
    lines = str(report).splitlines()
    assert 2 <= len(lines) <= 4
    assert str(report) in capsys.readouterr().out
    for estimate in (report.npe, report.proxy_held_out, report.main):
        assert estimate.error > 0
    assert report.main.value <= report.npe.value
    assert report.experts == (("maf", pytest.approx(1.0)),)


def test_silent_training_prints_nothing(capsys):
    trained()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_appended_simulations_are_not_forgotten_in_silence():
    inference = trained(max_num_epochs=1)
    inference.append_simulations(*simulate(30))
    with pytest.raises(ValueError, match=r"resume_training=True continues on the 60 simulations"):
        train(inference, resume_training=True)


def test_changed_options_are_not_ignored_in_silence():
    inference = trained(max_num_epochs=1)
    inference.options = replace(TINY, num_steps=8)
    with pytest.raises(ValueError, match=r"options were changed.*num_steps"):
        train(inference, resume_training=True)


SCRIPT = """
import sys, torch, time
sys.path.insert(0, {folder!r})
from contract_tools import TINY, fresh, simulate, train
from dataclasses import replace
from sbi_jeffreys.training.stage import SymmetricStage
torch.manual_seed(3)
options = replace(TINY, num_steps=40, checkpoint={path!r}, checkpoint_seconds=0.0)
inference = fresh(options=options).append_simulations(*simulate(100))
original = SymmetricStage.run_epoch
def slow(self, next_real):
    if self.step >= {halt}:
        print("here", flush=True)
        time.sleep(60)
    return original(self, next_real)
SymmetricStage.run_epoch = slow
train(inference, 30)
print("done", flush=True)
"""


@pytest.mark.slow
@pytest.mark.full_reading
def test_a_killed_training_goes_on_from_its_checkpoint_as_if_nothing_had_happened(tmp_path):
    path, folder = str(tmp_path / "training.sbij"), os.path.dirname(os.path.dirname(__file__))
    script = textwrap.dedent(SCRIPT).format(folder=folder, path=path, halt=20)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
    inference = NPE_Jeffreys.load(path)
    assert inference._training.stage.step == 20
    assert inference.build_posterior().sample((3,), x=X_O, show_progress_bars=False).shape == (3, 2)
    train(inference, 30, resume_training=True)
    torch.manual_seed(3)
    options = replace(TINY, num_steps=40)
    whole = fresh(options=options).append_simulations(*simulate(100))
    train(whole, 30)
    assert torch.equal(weights(whole), weights(inference))
    assert {name for name in os.listdir(tmp_path) if "sbij" in name} == {"training.sbij"}


def test_a_parameter_that_is_constant_is_named():
    """Without a prior nothing else forbids it, and a density of it has no upper bound."""
    torch.manual_seed(0)
    theta = torch.cat([torch.randn(200, 1), torch.full((200, 1), 3.0)], dim=1)
    x = theta + 0.1 * torch.randn(200, 2)
    inference = NPE_Jeffreys(show_progress_bars=False).append_simulations(theta, x)
    with pytest.warns(JeffreysWarning, match=r"constant in dimensions \[1\]"):
        inference.train(max_num_epochs=3)
    assert inference.proxy is None


@pytest.mark.parametrize("apart", [1.7, 2.1])
def test_a_main_that_has_not_reached_its_proxy_on_the_proxys_draws_is_named(apart, monkeypatch):
    """Also where held-out losses, of few pairs and of a proxy that is read badly, show nothing."""
    run_epoch = SymmetricStage.run_epoch

    def run(self, next_real):
        run_epoch(self, next_real)
        self.latest["reverse"] = apart
        return dict(self.latest)

    monkeypatch.setattr(SymmetricStage, "run_epoch", run)
    monkeypatch.setattr(conclusion, "_GAP", float("inf"))
    options = replace(STEPS, max_multiplier=1e9)
    inference = fresh(options=options).append_simulations(*simulate(200))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inference.train(max_num_epochs=20)
    report = inference.training_report
    assert report.apart == apart
    assert (Problem.MAIN_APART in report.problems) == (apart > 2)
    said = [str(w.message) for w in caught if issubclass(w.category, JeffreysWarning)]
    assert any("far apart on the proxy's own draws (2.1 nats)" in text for text in said) == (
        apart > 2
    )

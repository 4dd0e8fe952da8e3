"""Pickles, deep copies, files, and resuming: nothing is lost, and nothing changes."""

import copy
import json
import os
import pickle
import stat
import tempfile
import warnings
import zipfile
from dataclasses import replace

import pytest
import torch
from contract_tools import (
    PLAIN,
    PRIOR,
    TINY,
    X_O,
    fresh,
    refused,
    simulate,
    simulator,
    train,
    trained,
    weights,
)
from sbi.neural_nets import posterior_nn
from sbi.utils import BoxUniform, RestrictedPrior

from sbi_jeffreys import JeffreysWarning, NPE_Jeffreys, _sbi
from sbi_jeffreys.training import persistence
from sbi_jeffreys.training.held_out import HeldOut
from sbi_jeffreys.training.report import Kept, ProxyStatus, StageStatus
from sbi_jeffreys.training.symmetric import TRACES, SymmetricTraining


def pickled(inference: NPE_Jeffreys) -> NPE_Jeffreys:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pickle.loads(pickle.dumps(inference))


def copied(inference: NPE_Jeffreys) -> NPE_Jeffreys:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy.deepcopy(inference)


def saved(inference: NPE_Jeffreys) -> NPE_Jeffreys:
    with tempfile.TemporaryDirectory() as folder:
        inference.save(f"{folder}/inference.sbij")
        return NPE_Jeffreys.load(f"{folder}/inference.sbij")


WAYS = pytest.mark.parametrize("duplicate", [pickled, copied, saved])


def samples(inference: NPE_Jeffreys) -> torch.Tensor:
    torch.manual_seed(4)
    return inference.build_posterior().sample((20,), x=X_O, show_progress_bars=False)


@WAYS
def test_fresh_trainer(duplicate):
    inference = duplicate(fresh())
    inference.append_simulations(*simulate())
    train(inference)
    assert samples(inference).shape == (20, 2)


@WAYS
def test_after_append(duplicate):
    torch.manual_seed(0)
    inference = fresh().append_simulations(*simulate())
    other = duplicate(inference)
    for one in (inference, other):
        torch.manual_seed(1)
        train(one)
    assert torch.equal(weights(inference), weights(other))


@WAYS
def test_mid_symmetric_stage(duplicate):
    inference = trained(max_num_epochs=1)
    assert not inference._training.stage.finished
    other = duplicate(inference)
    for one in (inference, other):
        train(one, 5, resume_training=True)
        assert one._training.stage.finished
        assert one._training.stage.main is one._neural_net
    assert torch.equal(weights(inference), weights(other))


@WAYS
def test_finished(duplicate):
    inference = trained(max_num_epochs=500, stop_after_epochs=1)  # plain NPE has converged, too
    other = duplicate(inference)
    assert torch.equal(samples(inference), samples(other))
    x = X_O.expand(3, -1)
    theta = PRIOR.sample((3,)).unsqueeze(0)
    assert torch.equal(inference.proxy.log_potential(theta, x), other.proxy.log_potential(theta, x))
    assert other.summary == inference.summary
    train(other, resume_training=True)
    assert torch.equal(weights(inference), weights(other))


@WAYS
def test_retrain_from_scratch_where_the_estimator_has_a_name(duplicate):
    inference = duplicate(trained("nsf"))
    net = inference._training.set_aside or inference._neural_net
    inference.append_simulations(*simulate())
    train(inference, retrain_from_scratch=True, force_first_round_loss=True)
    again = inference._training.set_aside or inference._neural_net
    assert again is not net
    assert type(again) is type(net)


def test_names_are_rebuilt_without_transforms_and_prior():
    for options in (TINY, replace(TINY, marginal_transforms=False)):
        inference = pickled(fresh("maf", options, prior=None).append_simulations(*simulate()))
        train(inference)
        assert bool(torch.isfinite(samples(inference)).all())


def test_a_closure_is_lost_and_missed_by_name():
    inference = pickled(trained(posterior_nn("maf")))
    with pytest.raises(RuntimeError, match=r"density_estimator.*by name"):
        train(inference, retrain_from_scratch=True, force_first_round_loss=True)


def build_at_module_level(theta, x):
    return posterior_nn("maf")(theta, x)


def test_a_builder_that_can_be_pickled_is_kept():
    inference = pickled(trained(build_at_module_level))
    train(inference, retrain_from_scratch=True, force_first_round_loss=True)


def test_pickling_warns_of_what_is_lost_only():
    with pytest.warns(UserWarning, match="retrain_from_scratch"):
        pickle.dumps(trained(posterior_nn("maf")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pickle.dumps(trained())


# ---------------------------------------------------------------------- resuming, bit for bit


def test_resumed_stage_equals_an_uninterrupted_one_even_after_a_worse_epoch(monkeypatch):
    """Pausing hands out the best weights; resuming goes on from the last ones."""
    keep = SymmetricTraining.keep
    options = replace(TINY, num_steps=8)

    def never_better(self, value, losses):
        keep(self, float("inf"), losses)

    monkeypatch.setattr(SymmetricTraining, "keep", never_better)

    def last_weights(pauses: tuple[int, ...]) -> dict:
        torch.manual_seed(2)
        inference = trained(options=options, max_num_epochs=1)
        for epochs in pauses:
            inference = pickled(inference)
            train(inference, epochs, resume_training=True)
        assert inference._training.stage.step == 6
        return inference._training.symmetric.last_weights

    once, twice = last_weights((2,)), last_weights((1, 1))
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_resumed_between_batches_of_an_epoch_equals_uninterrupted():
    """100 simulations in batches of 20: an epoch of the stage ends after two of five batches."""

    def run(*pauses: int) -> NPE_Jeffreys:
        torch.manual_seed(4)
        inference = fresh(options=replace(TINY, num_steps=12)).append_simulations(*simulate(110))
        train(inference, 1, training_batch_size=20)
        for epochs in pauses:
            inference = pickled(inference)
            train(inference, epochs, training_batch_size=20, resume_training=True)
        assert inference._training.stage.finished
        return inference

    once, often = run(6), run(1, 2, 3)
    assert torch.equal(weights(once), weights(often))
    # Nor does the report depend on the number of pauses.
    assert once.training_report.proxy_held_out == often.training_report.proxy_held_out


@pytest.mark.parametrize("through_pickle", [False, True])
def test_exhausted_budget_without_symmetric_stage_resumes_sbis_loop(through_pickle):
    def run(budgets: tuple[int, ...]) -> NPE_Jeffreys:
        torch.manual_seed(5)
        inference = fresh(options=PLAIN).append_simulations(*simulate(100))
        for turn, budget in enumerate(budgets):
            train(inference, budget, resume_training=turn > 0)
            inference = pickled(inference) if through_pickle else inference
        return inference

    whole, parts = run((6,)), run((2, 6))
    # The premise: while every epoch improves, sbi hands out the last weights, not earlier ones.
    losses = whole.summary["validation_loss"]
    assert losses == sorted(losses, reverse=True)
    assert parts.summary["validation_loss"] == losses
    assert torch.equal(weights(whole), weights(parts))


@pytest.mark.parametrize("through_pickle", [False, True])
def test_plain_npe_that_was_cut_short_goes_on_once_the_stage_is_over(through_pickle):
    """As sbi's how-to does: `max_num_epochs` was too small, so resume with more."""
    torch.manual_seed(5)
    whole = fresh(options=PLAIN).append_simulations(*simulate(100))
    train(whole, 6)
    assert whole.summary["validation_loss"] == sorted(whole.summary["validation_loss"])[::-1]
    torch.manual_seed(5)
    parts = fresh().append_simulations(*simulate(100))
    train(parts, 2)
    assert parts.training_report.stage_status is StageStatus.FINISHED
    first = parts.proxy
    parts = pickled(parts) if through_pickle else parts
    train(parts, 6, resume_training=True)
    report, best = parts.training_report, whole.summary["best_validation_loss"][-1]
    assert report.npe.value == pytest.approx(best, abs=1e-5)
    assert report.stage_status is StageStatus.FINISHED
    assert parts.proxy is not first


@pytest.mark.parametrize("name", ["force_first_round_loss", "discard_prior_samples"])
def test_resuming_in_other_units_is_refused(name):
    """Losses of the two calls would be compared, or other simulations be taken for the split."""
    inference = trained()
    theta, x = simulate(40)
    inference.append_simulations(theta, x, inference.build_posterior().set_default_x(X_O))
    train(inference, 1, **{name: True})
    refused(lambda: train(inference, resume_training=True), ValueError, name, "True", "False")
    train(inference, 5, resume_training=True, **{name: True})
    assert inference.training_report.stage_status is not StageStatus.PAUSED


def test_resuming_without_the_kernel_is_refused():
    inference = trained(max_num_epochs=1, calibration_kernel=lambda x: torch.ones(len(x)))
    refused(
        lambda: train(inference, resume_training=True), ValueError, "calibration_kernel", "none"
    )


def test_a_paused_stage_goes_on_before_plain_npe_that_was_cut_short():
    inference = trained(max_num_epochs=1)
    with pytest.warns(JeffreysWarning, match="Plain NPE was stopped by max_num_epochs"):
        inference.train(max_num_epochs=5, resume_training=True)
    assert inference.training_report.stage_status is StageStatus.FINISHED
    epochs = inference.epoch
    train(inference, 5, resume_training=True)
    assert inference.epoch > epochs


def test_resuming_after_a_refused_proxy_goes_on_with_sbis_loop_and_tries_again(monkeypatch):
    monkeypatch.setattr("sbi_jeffreys.training.preparation.trust", lambda *values: 0.0)
    inference = trained(options=replace(TINY, min_trust=0.5))
    assert inference.training_report.proxy_status is ProxyStatus.UNTRUSTED
    train(inference, 5, resume_training=True)
    assert len(inference.summary["validation_loss"]) == 6
    assert len(inference.summary["proxy"]) == 2


def test_interrupt_in_stage_0_resumes(monkeypatch):
    inference = fresh().append_simulations(*simulate())
    original, calls = NPE_Jeffreys._train_epoch, [0]

    def interrupted(self, *args):
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(NPE_Jeffreys, "_train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        inference.train(max_num_epochs=3)
    inference = pickled(inference)
    train(inference, 3, resume_training=True)
    assert inference._training.stage.finished


@pytest.mark.parametrize("where", ["main_losses", "reverse"])
def test_an_interrupt_while_the_last_epoch_is_judged_loses_nothing(monkeypatch, where):
    """Neither the annealed weights, which no epoch has judged yet, nor the epoch's traces."""
    original = getattr(HeldOut, where)

    def run(interrupts: int) -> NPE_Jeffreys:
        torch.manual_seed(2)
        inference = fresh().append_simulations(*simulate(200))
        left = [interrupts]

        def judged(self, main, proxy=None):
            stage = inference._training.stage
            if stage is not None and stage.finished and left[0]:
                left[0] -= 1
                raise KeyboardInterrupt
            return original(self, main, proxy)

        monkeypatch.setattr(HeldOut, where, judged)
        for attempt in range(interrupts):
            with pytest.raises(KeyboardInterrupt):
                train(inference, 5, resume_training=attempt > 0)
            assert inference._training.symmetric.status is StageStatus.PAUSED
            inference = pickled(inference)
        train(inference, 5, resume_training=interrupts > 0)
        return inference

    whole, parts = run(0), run(2)
    assert whole.training_report.kept is Kept.LAST
    for inference in (whole, parts):
        assert inference.training_report.kept is Kept.LAST
        assert inference.training_report.stage_status is StageStatus.FINISHED
    for name in (*TRACES, "training_loss", "validation_loss"):
        assert parts.summary[name] == pytest.approx(whole.summary[name], nan_ok=True)
    assert torch.equal(weights(whole), weights(parts))


# ---------------------------------------------------------------------- the file


@pytest.fixture(scope="module")
def inference() -> NPE_Jeffreys:
    return trained()


def test_file_is_one_and_replaced_whole(inference, tmp_path, monkeypatch):
    path = tmp_path / "a.sbij"
    inference.save(path)
    inference.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.sbij"]
    before = path.read_bytes()

    def fails(*args):
        raise OSError("disk full")

    monkeypatch.setattr(persistence.os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        inference.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.sbij"]


def test_header_is_readable(inference, tmp_path):
    inference.save(tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "a") as archive:
        header = json.loads(archive.read("header.json"))
    assert header["format_version"] == persistence.FORMAT_VERSION
    assert set(header["packages"]) == {"sbi_jeffreys", "sbi", "torch", "python"}


@pytest.mark.parametrize(
    "damage", ["text", "cut", "flip", "newer", "older", "zero", "true", "other", "pickle"]
)
def test_wrong_files_are_named_with_a_remedy(inference, tmp_path, damage):
    path = tmp_path / "damaged.sbij"
    inference.save(path)
    whole = path.read_bytes()
    if damage == "text":
        path.write_text("theta, x")
    elif damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "flip":
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    else:
        header: dict[str, object] = {"format": "sbi_jeffreys inference", "packages": {"sbi": "9"}}
        changes = {"newer": 99, "older": 1, "zero": 0, "true": True}
        header["format_version"] = changes.get(damage, persistence.FORMAT_VERSION)
        if damage == "other":
            header["format"] = "x"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("header.json", json.dumps(header))
            archive.writestr("inference.pt", b"no pickle")
    with pytest.raises(ValueError, match=r"damaged\.sbij.*([Ii]nstall|save it anew)"):
        NPE_Jeffreys.load(path)


def test_other_content_and_absent_file(tmp_path):
    persistence.save({"a": 1}, tmp_path / "dict", {})
    with pytest.raises(ValueError, match="holds a dict"):
        NPE_Jeffreys.load(tmp_path / "dict")
    with pytest.raises(FileNotFoundError, match="absent"):
        NPE_Jeffreys.load(tmp_path / "absent")


def test_what_cannot_be_pickled_is_said(inference, tmp_path):
    other = copied(inference)
    other.extra = lambda: None
    with pytest.raises(TypeError, match="must be picklable"):
        other.save(tmp_path / "a")
    assert not list(tmp_path.glob("*a*"))


def test_any_flipped_or_missing_byte_is_a_value_error(inference, tmp_path):
    path = tmp_path / "damaged"
    inference.save(path)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        place = int(torch.randint(len(whole), (), generator=generator))
        bit = 1 << int(torch.randint(8, (), generator=generator))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        try:
            NPE_Jeffreys.load(path)
        except ValueError as error:
            assert "damaged" in str(error)  # noqa: PT017 - damage may also hit unused bytes


def test_mode_and_link_are_respected(inference, tmp_path):
    path, link = tmp_path / "real", tmp_path / "link"
    umask = os.umask(0o027)
    try:
        inference.save(path)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    link.symlink_to(path)
    inference.save(link)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_weights_load_without_running_code(inference, tmp_path, monkeypatch):
    inference.save(tmp_path / "a")

    def forbidden(*args, **kwargs):
        raise AssertionError("a pickle was loaded")

    monkeypatch.setattr(persistence, "load", forbidden)
    other = fresh().load_weights(tmp_path / "a")
    assert torch.equal(samples(inference), samples(other))
    with pytest.raises(ValueError, match="do not fit the density_estimator"):
        fresh("nsf").load_weights(tmp_path / "a")
    with pytest.raises(RuntimeError, match="without simulations"):
        other.load_weights(tmp_path / "a")


def test_other_package_versions_are_warned_of(inference, tmp_path, monkeypatch):
    inference.save(tmp_path / "a")
    monkeypatch.setattr(persistence, "_versions", lambda: {"sbi": "0.99"})
    with pytest.warns(JeffreysWarning, match=r"saved with .*this environment has sbi 0\.99"):
        NPE_Jeffreys.load(tmp_path / "a")


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_CUDA)])
def test_load_onto_a_device_and_go_on(tmp_path, device):
    trained(max_num_epochs=1).save(tmp_path / "a")
    inference = NPE_Jeffreys.load(tmp_path / "a", device=device)
    train(inference, 5, resume_training=True)
    assert inference._training.stage.finished
    theta, x = X_O[None].to(device), X_O.to(device)
    assert inference._neural_net.log_prob(theta, x).shape == (1, 1)


def test_a_loaded_trainer_knows_the_users_prior(tmp_path):
    """sbi compares priors by identity: after `load`, a proposal of the same values is the prior."""
    torch.manual_seed(0)
    inference = trained(options=PLAIN)
    inference.save(tmp_path / "trainer.pt")
    loaded = NPE_Jeffreys.load(tmp_path / "trainer.pt")
    PRIOR.log_prob(torch.zeros(1, 2))
    truncated = RestrictedPrior(PRIOR, lambda theta: theta[:, 0] < 0, sample_with="rejection")
    for proposal in (PRIOR, truncated):
        for trainer in (inference, loaded):
            theta = proposal.sample((40,))
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="The proposal you passed")
                trainer.append_simulations(theta, simulator(theta), proposal=proposal)
            assert _sbi.latest_round(trainer) == 0
    found = _sbi.truncated_rounds(loaded)
    assert found is not None
    assert [proposal is None for proposal, _ in found] == [True, True, False]
    other = BoxUniform(-torch.ones(2), 2 * torch.ones(2))
    with pytest.warns(UserWarning, match="neither the prior nor"):
        loaded.append_simulations(*simulate(40, other), proposal=other)
    assert _sbi.latest_round(loaded) == 1

"""A refused call of `train` changes nothing; one that begins forgets the training before it."""

import math

import pytest
import torch
from contract_tools import PLAIN, X_O, fresh, simulate, train, trained, weights
from torch.distributions import MultivariateNormal

from sbi_jeffreys import NPE_Jeffreys
from sbi_jeffreys.training import own_space


def state(inference: NPE_Jeffreys) -> dict[str, object]:
    """Everything that a call of `train` binds anew, and the weights by value."""
    return {**vars(inference), **vars(inference._training), "weights": weights(inference).tolist()}


def same(one: dict[str, object], two: dict[str, object]) -> bool:
    """Whether names agree and values are the same objects or, where they are plain, equal."""
    plain = (int, float, list)
    return one.keys() == two.keys() and all(
        value is two[name] or (isinstance(value, plain) and value == two[name])
        for name, value in one.items()
    )


def again(inference: NPE_Jeffreys) -> None:
    """Train as if there had been no training yet, which sbi refuses."""
    inference.train()


def kernel(inference: NPE_Jeffreys) -> None:
    inference.train(force_first_round_loss=True, calibration_kernel=lambda x: x, num_atoms=3)


def loader(inference: NPE_Jeffreys) -> None:
    """sbi has made another split when torch refuses the loader."""
    inference.train(force_first_round_loss=True, dataloader_kwargs={"num_workers": -1})


def builder(inference: NPE_Jeffreys) -> None:
    """A new network cannot be built."""
    built = inference._builder

    def broken(theta, x):
        raise ValueError("no network")

    inference._builder = inference._build_neural_net = broken
    try:
        inference.train(force_first_round_loss=True, retrain_from_scratch=True)
    finally:
        inference._builder = inference._build_neural_net = built


@pytest.mark.filterwarnings("ignore::sbi_jeffreys.JeffreysWarning")
@pytest.mark.parametrize("call", [again, kernel, loader, builder])
def test_a_call_that_something_refuses_changes_nothing(call):
    inference = trained(max_num_epochs=1)  # the symmetric stage is paused
    before, proxy = state(inference), inference.proxy
    with pytest.raises(ValueError, match=r"already been trained|kernel|num_workers|no network"):
        call(inference)
    assert same(before, state(inference))
    assert inference.proxy is proxy is not None
    inference.build_corrected_posterior(100).sample((3,), x=X_O, show_progress_bars=False)
    train(inference, 5, resume_training=True)
    assert inference._training.stage.finished


def test_parameters_outside_the_prior_are_refused_and_change_nothing():
    inference = trained()
    inference.append_simulations(*(t + 3.0 for t in simulate(20)))
    before = state(inference)
    with pytest.raises(ValueError, match="inside the prior's support"):
        inference.train(force_first_round_loss=True)
    assert same(before, state(inference))


def test_a_resumed_training_is_the_same_after_a_refusal():
    """Bit for bit: the refused call has not drawn from the training's random stream."""

    def run(refused: bool) -> torch.Tensor:
        torch.manual_seed(3)
        inference = trained(max_num_epochs=1)
        if refused:
            with pytest.raises(ValueError, match="already been trained"):
                inference.train()
        train(inference, 5, resume_training=True)
        return weights(inference)

    assert torch.equal(run(False), run(True))


def test_a_main_keeps_its_weights_when_a_call_is_refused():
    """Those of the symmetric stage, not the best ones of plain NPE, which sbi keeps."""
    torch.manual_seed(0)
    inference = trained(num=200)
    before = weights(inference)
    plain = inference._best_model_state_dict
    assert any(not torch.equal(v, plain[n]) for n, v in inference._neural_net.state_dict().items())
    with pytest.raises(ValueError, match="already been trained"):
        inference.train()
    assert torch.equal(weights(inference), before)


def test_a_first_call_that_is_refused_leaves_an_untrained_trainer():
    inference = fresh().append_simulations(*simulate())
    with pytest.raises(ValueError, match="calibration_kernel"):
        inference.train(calibration_kernel=lambda x: x)
    assert not hasattr(inference, "train_indices")
    assert repr(inference).endswith("not trained")
    train(inference)
    assert inference.proxy is not None


def test_a_bad_kernel_of_a_resumed_call_leaves_the_main_that_was_kept(monkeypatch):
    """The stage has ended with plain NPE, of which the one in θ's own space was kept."""
    monkeypatch.setattr(own_space, "_MARGIN", -math.inf)
    monkeypatch.setattr("sbi_jeffreys.training.symmetric.SymmetricTraining.keep", lambda *_: None)
    inference = trained()
    kept, aside = inference._neural_net, inference._training.set_aside
    assert aside is not None
    with pytest.raises(ValueError, match="calibration_kernel"):
        inference.train(resume_training=True, calibration_kernel=lambda x: x)
    assert inference._neural_net is kept
    assert inference._training.set_aside is aside


def test_an_interrupted_training_has_no_report_of_the_one_before(monkeypatch):
    inference = trained()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("sbi_jeffreys.training.training.prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(inference, force_first_round_loss=True)
    assert inference.training_report is None
    assert inference.proxy is None
    assert "whose training has not ended" in repr(inference)


def test_an_interrupt_in_the_first_epoch_is_no_refusal(monkeypatch):
    """The network is the one that training began with, and the call can be resumed."""
    inference = fresh(options=PLAIN, prior=MultivariateNormal(torch.zeros(2), torch.eye(2)))
    train(inference.append_simulations(*simulate()))
    before, split = weights(inference), inference.train_indices

    def interrupted(*arguments):
        for parameter in inference._neural_net.parameters():
            parameter.data.add_(1.0)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(NPE_Jeffreys, "_train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(inference, force_first_round_loss=True)
    assert torch.equal(weights(inference), before)
    assert inference.train_indices is not split
    assert inference.training_report is None
    train(inference, resume_training=True, force_first_round_loss=True)
    assert inference.training_report is not None

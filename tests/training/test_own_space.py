"""Plain NPE that is the result: with θ in the prior's space or in its own, whichever is better."""

import math
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from contract_tools import PLAIN, PRIOR, TINY, X_O, fresh, simulate, train, trained, weights
from known_posteriors import Known
from sbi.neural_nets import posterior_nn
from torch.distributions import Independent, MultivariateNormal, Normal

from sbi_jeffreys import GivenProxy, JeffreysWarning, MainBuilder, NPE_Jeffreys
from sbi_jeffreys.networks.builders import UnconstrainedDensityEstimator
from sbi_jeffreys.training import own_space
from sbi_jeffreys.training.held_out import HeldOut
from sbi_jeffreys.training.own_space import _SameSplit
from sbi_jeffreys.training.report import Kept, Space

NOISE = 0.3  # of contract_tools' simulator: the posterior is N(x, NOISE²), cut off at the box


def gaussian(shift: float = 0.0) -> Known:
    """The exact posterior before it is cut off at the box, or one that is shifted."""
    return Known(lambda x: Independent(Normal(x + shift, NOISE), 1))


def log_inside(x: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
    """log P(θ' in the box) of `gaussian(shift)`, in closed form."""
    law = Normal(x + shift, NOISE)
    return (law.cdf(torch.ones(())) - law.cdf(-torch.ones(()))).log().sum(-1)


def rival(monkeypatch, network: torch.nn.Module) -> None:
    """Take this network for plain NPE with θ in its own space."""
    monkeypatch.setattr(own_space, "_train_own", lambda *arguments: network)


def forced(monkeypatch, space: Space) -> None:
    """Keep the one in this space, whichever is better."""
    margin = math.inf if space is Space.PRIOR else -math.inf
    monkeypatch.setattr(own_space, "_MARGIN", margin)


@pytest.fixture
def own(monkeypatch) -> NPE_Jeffreys:
    """A plain NPE that was kept with θ in its own space."""
    forced(monkeypatch, Space.OWN)
    return trained(options=PLAIN)


def is_own(inference: NPE_Jeffreys) -> bool:
    return not isinstance(inference._neural_net, UnconstrainedDensityEstimator)


# ------------------------------------------------------------------ which one is better


def test_the_loss_is_that_of_the_posterior_cut_off_at_the_prior():
    theta, x = simulate(100)
    found = HeldOut(theta, x, torch.ones(100)).truncated_losses(gaussian(), PRIOR)
    exact = -Normal(x, NOISE).log_prob(theta).sum(-1) + log_inside(x)
    often = log_inside(x).exp() > 0.05
    assert int(often.sum()) > 90
    assert float((found - exact)[often].abs().max()) < 0.5  # 500 draws each
    assert float((found - exact)[often].mean()) == pytest.approx(0.0, abs=0.02)


def test_what_rejection_would_never_accept_has_a_loss_that_is_bounded_from_above():
    """Of 500 draws none is inside: log 0 would make it the best of all."""
    theta, x = simulate(20)
    found = HeldOut(theta, x, torch.ones(20)).truncated_losses(gaussian(4.0), PRIOR)
    raw = -Normal(x + 4.0, NOISE).log_prob(theta).sum(-1)
    assert bool((log_inside(x.double(), 4.0) < math.log(1e-6)).all())
    assert torch.allclose(found, raw + math.log(0.01))


def test_the_exact_posterior_is_kept_and_its_gain_is_right(monkeypatch):
    exact = gaussian()
    rival(monkeypatch, exact)
    inference = trained(options=PLAIN, num=400)
    theta, x = (t[inference.val_indices] for t in inference.get_simulations()[:2])
    choice = inference.training_report.space
    assert inference._neural_net is exact
    assert choice.kept is Space.OWN
    truth = float((-Normal(x, NOISE).log_prob(theta).sum(-1) + log_inside(x)).mean())
    assert choice.own.value == pytest.approx(truth, abs=0.03)
    assert choice.gain.value == pytest.approx(choice.prior.value - choice.own.value)
    assert choice.gain.value > choice.gain.error > 0


def test_pairs_that_the_kernel_excludes_do_not_choose(monkeypatch):
    """The rival is exact, but nothing is left to say so."""
    rival(monkeypatch, gaussian())
    inference = trained(options=PLAIN, calibration_kernel=lambda x: torch.zeros(len(x)))
    assert not is_own(inference)
    assert inference.training_report.space is None


@pytest.mark.parametrize("shift", [0.9, 4.0])
def test_a_worse_one_is_not_kept(monkeypatch, shift):
    rival(monkeypatch, gaussian(shift))
    inference = trained(options=PLAIN, num=400, max_num_epochs=60)
    assert not is_own(inference)
    assert inference.training_report.space.kept is Space.PRIOR
    assert inference.training_report.space.gain.value < 0


def test_one_as_good_is_not_kept(monkeypatch):
    """A tie is for the main from which nothing leaks."""
    original = own_space.choose_space

    def with_itself(trainer, *arguments):
        rival(monkeypatch, trainer._neural_net)
        return original(trainer, *arguments)

    monkeypatch.setattr("sbi_jeffreys.training.training.choose_space", with_itself)
    choice = trained(options=PLAIN).training_report.space
    assert choice.gain.value == pytest.approx(0.0, abs=1e-6)
    assert choice.kept is Space.PRIOR


@pytest.mark.parametrize(("gain", "kept"), [(0.01, Space.PRIOR), (0.3, Space.OWN)])
def test_a_gain_within_its_error_is_luck(monkeypatch, gain, kept):
    def losses(self, main, prior):
        noise = 0.3 * torch.tensor([1.0, -1.0]).repeat(len(self.theta) // 2)
        return mains[-1] - gain + noise

    def seen(self, main, proxy=None):
        mains.append(original(self, main, proxy))
        return mains[-1]

    mains, original = [], HeldOut.main_losses
    monkeypatch.setattr(HeldOut, "main_losses", seen)
    monkeypatch.setattr(HeldOut, "truncated_losses", losses)
    choice = trained(options=PLAIN).training_report.space  # 6 pairs: an error of 0.13
    assert choice.gain.value == pytest.approx(gain, abs=1e-5)
    assert choice.gain.error == pytest.approx(0.3 / math.sqrt(5))
    assert choice.kept is kept


def test_one_that_cannot_be_trained_is_none(monkeypatch):
    def broken(*arguments):
        raise ValueError("NaN/Inf present in NPE loss.")

    monkeypatch.setattr(own_space, "_train_own", broken)
    assert trained(options=PLAIN).training_report.space is None


@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_one_that_fails_is_warned_of_and_the_first_is_kept(monkeypatch, where):
    def failing(*arguments):
        raise RuntimeError("not enough memory")

    forced(monkeypatch, Space.OWN)
    if where == "training":
        monkeypatch.setattr(own_space, "_train_own", failing)
    else:
        monkeypatch.setattr(HeldOut, "truncated_losses", failing)
    inference = fresh(options=PLAIN).append_simulations(*simulate())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inference.train(max_num_epochs=2)
    (warning,) = [each for each in caught if issubclass(each.category, JeffreysWarning)]
    assert "not enough memory" in str(warning.message)
    assert "the first one was kept" in str(warning.message)
    assert warning.filename == __file__
    assert inference.training_report.space is None
    assert not is_own(inference)
    assert inference._training.set_aside is None


# ------------------------------------------------------------------ when there is a choice


def never(*arguments):
    raise LookupError("a second network was trained")  # not an error that counts as divergence


@pytest.mark.parametrize(
    "make",
    [
        lambda: fresh(posterior_nn("maf"), PLAIN),
        lambda: fresh("mdn", PLAIN),
        lambda: fresh(MainBuilder("maf", marginal_transforms=False), PLAIN),
        lambda: fresh("maf", PLAIN, MultivariateNormal(torch.zeros(2), torch.eye(2))),
    ],
    ids=["own-builder", "mixture", "no-transforms", "unbounded"],
)
@pytest.mark.filterwarnings("ignore:density_estimator is a builder of your own")
def test_no_choice_where_the_main_is_not_in_a_bounded_priors_space(monkeypatch, make):
    monkeypatch.setattr(own_space, "_train_own", never)
    inference = make().append_simulations(*simulate())
    train(inference)
    assert inference.training_report.space is None


def test_no_choice_where_the_symmetric_stage_is_paused(monkeypatch):
    monkeypatch.setattr(own_space, "_train_own", never)
    assert trained(options=TINY, max_num_epochs=1).training_report.space is None


def test_a_stage_that_ends_with_plain_npe_is_a_choice(monkeypatch):
    """Steps of size zero change nothing, so plain NPE's weights stay the best ones."""
    rival(monkeypatch, gaussian())
    options = replace(TINY, learning_rate_factor=1e-12, reverse_batch_size=2)
    monkeypatch.setattr("sbi_jeffreys.training.symmetric.SymmetricTraining.keep", lambda *_: None)
    inference = trained(options=options, num=400)
    report = inference.training_report
    assert report.kept is Kept.PLAIN_NPE
    assert report.space.kept is Space.OWN
    assert report.main == report.space.own
    assert report.coverage.values.tolist() == pytest.approx([0.5, 0.9], abs=0.25)
    again = inference._neural_net
    train(inference, resume_training=True)  # the stage is over: the same choice
    assert inference._neural_net is again


@pytest.mark.filterwarnings("ignore::sbi_jeffreys.JeffreysWarning")
def test_a_refused_proxy_is_a_choice_and_corrects_draws_of_what_was_kept(monkeypatch):
    forced(monkeypatch, Space.OWN)

    def wrong(theta, x):
        return -((x - theta - 0.6) ** 2).sum(-1) / (2 * 0.05**2)

    options = replace(TINY, proxy=GivenProxy(PRIOR, wrong), min_trust=0.3)
    inference = trained(options=options, num=200, max_num_epochs=20)
    assert inference.training_report.refused
    assert is_own(inference)
    corrected = inference.build_corrected_posterior(2_000, power=0.1)
    drawn = corrected.sample((100,), x=X_O, show_progress_bars=False)
    assert bool((drawn.abs() <= 1).all())


# ------------------------------------------------------------------ what comes afterwards


def test_the_second_one_is_trained_on_the_same_split(monkeypatch):
    seen = []
    original = _SameSplit.get_dataloaders

    def loaders(self, *arguments, **keywords):
        found = original(self, *arguments, **keywords)
        seen.append([sorted(loader.sampler.indices) for loader in found])
        return found

    monkeypatch.setattr(_SameSplit, "get_dataloaders", loaders)
    inference = trained(options=PLAIN)
    split = inference.train_indices, inference.val_indices
    assert seen == [[sorted(indices.tolist()) for indices in split]]


def test_the_posterior_is_cut_off_at_the_prior(own):
    assert is_own(own)
    raw = own._neural_net.sample(torch.Size((2000,)), X_O)
    posterior = own.build_posterior()
    drawn = posterior.sample((500,), x=X_O, show_progress_bars=False)
    assert bool((drawn.abs() <= 1).all())
    share = float((raw.abs() <= 1).all(-1).float().mean())
    assert share < 1  # it leaks, and sbi's density makes up for that
    difference = posterior.log_prob(drawn, x=X_O) - own._neural_net.log_prob(
        drawn.unsqueeze(1), X_O
    ).squeeze(1)
    assert torch.allclose(difference, torch.tensor(-math.log(share)), atol=0.1)


def test_it_is_said_in_report_and_repr(own, monkeypatch):
    said = str(own.training_report)
    assert said.count("in its own space, cut off at the prior's edge") == 1
    assert "those of plain NPE in its own space" in repr(own)
    forced(monkeypatch, Space.PRIOR)
    other = trained(options=PLAIN)
    assert not is_own(other)
    assert "models theta in the prior's unconstrained space" in str(other.training_report)


def test_it_is_saved_loaded_and_its_weights_are_read(own, tmp_path):
    own.save(tmp_path / "a")
    unpickled = pickle.loads(pickle.dumps(own))
    read = fresh(options=PLAIN).load_weights(tmp_path / "a")
    for other in (NPE_Jeffreys.load(tmp_path / "a"), unpickled, read):
        assert is_own(other)
        assert torch.equal(weights(own), weights(other))


def test_resumed_equals_uninterrupted(monkeypatch):
    """Bit for bit, for both networks, though the one set aside is the one that is resumed."""
    forced(monkeypatch, Space.OWN)

    def run(*budgets: int) -> list[torch.Tensor]:
        torch.manual_seed(4)
        inference = fresh(options=PLAIN).append_simulations(*simulate())
        for number, epochs in enumerate(budgets):
            train(inference, epochs, resume_training=number > 0)
            inference = pickle.loads(pickle.dumps(inference))
        aside = inference._training.set_aside
        assert aside is not None
        return [weights(inference), *(p.detach() for p in aside.parameters())]

    for one, two in zip(run(6), run(2, 6)):
        assert torch.equal(one, two)


def test_an_interrupted_resumption_has_no_report_of_the_other_network(own, monkeypatch):
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("sbi.inference.NPE_C._loss", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        own.train(max_num_epochs=20, resume_training=True)
    assert not is_own(own)
    assert own.training_report is None


def test_the_next_round_goes_on_in_the_priors_space(own, monkeypatch):
    aside = own._training.set_aside
    proposal = own.build_posterior().set_default_x(X_O)
    own.append_simulations(*simulate(60, proposal), proposal=proposal)
    monkeypatch.setattr(own_space, "_train_own", never)
    train(own)
    assert own._neural_net is aside
    assert own.training_report.space is None
    raw = own._neural_net.sample(torch.Size((500,)), X_O)
    assert bool((raw.abs() <= 1).all())


def test_a_call_that_sbi_refuses_changes_nothing(own):
    before = own._neural_net
    with pytest.raises(ValueError, match="already been trained"):
        own.train()
    assert own._neural_net is before


def test_the_proxy_is_fitted_with_the_main_in_the_priors_space(own):
    """The symmetric stage of a training that was begun without one."""
    aside = own._training.set_aside
    own.options = TINY
    train(own, 10, resume_training=True)
    assert own._training.stage.main is aside
    assert own.training_report.kept is not None


def test_it_is_silent(capsys, monkeypatch):
    forced(monkeypatch, Space.OWN)
    inference = fresh(options=PLAIN).append_simulations(*simulate())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inference.train(max_num_epochs=2)
    assert capsys.readouterr() == ("", "")
    assert sum("has not yet fully converged" in str(each.message) for each in caught) == 1
    assert not [each for each in caught if issubclass(each.category, JeffreysWarning)]


def test_an_interrupt_leaves_the_first(monkeypatch):
    whole = trained(options=PLAIN)
    forced(monkeypatch, Space.PRIOR)

    def interrupted(self, *arguments, **keywords):
        torch.set_grad_enabled(False)
        raise KeyboardInterrupt

    monkeypatch.setattr(_SameSplit, "get_dataloaders", interrupted)
    torch.manual_seed(0)
    inference = fresh(options=PLAIN).append_simulations(*simulate())
    with pytest.raises(KeyboardInterrupt):
        train(inference)
    first = whole._training.set_aside or whole._neural_net
    assert torch.is_grad_enabled()
    assert not inference._neural_net.training
    for one, two in zip(inference._neural_net.parameters(), first.parameters()):
        assert torch.equal(one, two)
    inference.build_posterior().sample((3,), x=X_O, show_progress_bars=False)

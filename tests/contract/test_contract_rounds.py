"""Several rounds, and every keyword of `train` that changes what is fitted."""

import warnings
from dataclasses import replace

import pytest
import torch
from contract_tools import PRIOR, TINY, X_O, fresh, simulate, train, trained, weights
from sbi.neural_nets import posterior_nn
from sbi.neural_nets.embedding_nets import FCEmbedding, PermutationInvariantEmbedding
from sbi.utils import RestrictedPrior, get_density_thresholder
from torch.distributions import MultivariateNormal, Normal, Uniform
from torch.utils.data import default_collate

from sbi_jeffreys import NPE_Jeffreys, _sbi
from sbi_jeffreys.proxies import LikelihoodProxy
from sbi_jeffreys.training import data
from sbi_jeffreys.training.data import latest


@pytest.fixture
def seen(monkeypatch) -> list[int]:
    """How many pairs each fit of a likelihood proxy was given."""
    sizes, fit = [], LikelihoodProxy.fit

    def counted(self, theta, x, train_indices, val_indices, *args, **kwargs):
        sizes.append(len(train_indices) + len(val_indices))
        return fit(self, theta, x, train_indices, val_indices, *args, **kwargs)

    monkeypatch.setattr(LikelihoodProxy, "fit", counted)
    return sizes


def second_round(inference: NPE_Jeffreys, num: int = 60, **kwargs) -> NPE_Jeffreys:
    proposal = inference.build_posterior().set_default_x(X_O)
    theta = proposal.sample((num,), show_progress_bars=False)
    x = theta + 0.3 * torch.randn_like(theta)
    inference.append_simulations(theta, x, proposal=proposal)
    train(inference, **kwargs)
    return inference


def draws(inference: NPE_Jeffreys, num: int = 20) -> torch.Tensor:
    return inference.build_posterior().sample((num,), x=X_O, show_progress_bars=False)


def test_three_atomic_rounds_with_the_proxy_on_all_of_them(seen):
    inference = trained()
    for _ in range(2):
        second_round(inference)
    assert seen == [60, 120, 180]
    assert not inference.use_non_atomic_loss
    assert len(inference.summary["epochs_trained"]) == 3
    assert bool((draws(inference).abs() <= 1).all())


def test_no_leakage_in_later_rounds():
    inference = second_round(second_round(trained()))
    raw = inference._neural_net.sample(torch.Size((500,)), X_O)
    assert bool((raw.abs() <= 1).all())


def test_truncated_proposals(seen):
    inference = trained()
    posterior = inference.build_posterior().set_default_x(X_O)
    accept = get_density_thresholder(posterior, quantile=1e-2, num_samples_to_estimate_support=200)
    restricted = RestrictedPrior(PRIOR, accept, sample_with="rejection")
    theta = restricted.sample((60,), show_progress_bars=False)
    inference.append_simulations(theta, theta + 0.3 * torch.randn_like(theta), proposal=restricted)
    train(inference, force_first_round_loss=True)
    assert seen == [60, 120]
    assert inference._round == 0
    assert draws(inference).shape == (20, 2)


@pytest.mark.parametrize(
    "prior", [PRIOR, MultivariateNormal(torch.zeros(2), torch.eye(2))], ids=["box", "gaussian"]
)
def test_mdn_keeps_sbis_closed_form_loss(prior):
    inference = fresh("mdn", prior=prior)
    inference.append_simulations(*simulate(60, prior))
    train(inference)
    second_round(inference)
    assert inference.use_non_atomic_loss
    assert len(inference.summary["trust"]) == 4


def test_draws_of_a_corrected_posterior_are_no_mixture_to_sbi():
    """Its `posterior_estimator` is one, and sbi's closed form made posteriors √2 too narrow."""
    inference = fresh("mdn")
    inference.append_simulations(*simulate(60))
    train(inference)
    proposal = inference.build_corrected_posterior(power=1.0).set_default_x(X_O)
    theta = proposal.sample((60,), show_progress_bars=False)
    inference.append_simulations(theta, theta + 0.3 * torch.randn_like(theta), proposal=proposal)
    train(inference)
    assert not inference.use_non_atomic_loss


def test_discard_prior_samples(seen):
    """By the main; the likelihood needs them, or it extrapolates where later rounds never are."""
    inference = second_round(trained(num=100), num=40, discard_prior_samples=True)
    assert seen == [100, 140]
    theta, x, _ = inference.get_simulations(1)
    simulations = data.simulations_for_proxy(inference, 1)
    fitted, judging = simulations.for_fit()
    assert len(judging) == 10 + 4  # a tenth of either round
    assert set(fitted.tolist()) | set(judging.tolist()) == set(range(140))
    assert simulations.theta[simulations.val].equal(theta[inference.val_indices])
    assert simulations.x[simulations.train].equal(x[inference.train_indices])
    assert len(inference._training.stage.pool.x) > 0


@pytest.mark.parametrize("kwargs", [{"use_combined_loss": True}, {"num_atoms": 3}])
def test_losses_of_later_rounds(kwargs):
    inference = second_round(trained(), **kwargs)
    assert len(inference.summary["trust"]) == 4


def test_first_round_loss_on_request_in_later_rounds():
    inference = second_round(trained(), force_first_round_loss=True)
    assert not inference._training.stage.pool.grouped


def test_retrain_from_scratch_builds_a_new_net_and_proxy():
    inference = trained()
    net, proxy = inference._neural_net, inference.proxy
    second_round(inference, retrain_from_scratch=True)
    assert inference._neural_net is not net
    assert inference.proxy is not proxy


def test_energy_proxy_in_later_rounds():
    inference = trained(options=replace(TINY, proxy="energy"))
    second_round(inference)
    assert inference.summary["proxy"] == ["energy: asked for"] * 2
    assert len(inference.summary["trust"]) == 4


@pytest.mark.parametrize("proxy_draws", [600, None])
def test_later_rounds_draw_fewer_pairs_unless_a_number_is_given(monkeypatch, proxy_draws):
    monkeypatch.setattr("sbi_jeffreys.training.preparation._DRAWS_OF_LATER_ROUNDS", 300)
    inference = trained(options=replace(TINY, proxy_draws=proxy_draws))
    first = inference.proxy.drawn.asked
    assert first == inference._training.stage.pool.asked == (proxy_draws or first)
    second_round(inference)
    assert inference.proxy.drawn.asked == (proxy_draws or 300)
    assert not inference._training.stage.pool.grouped


def test_the_pool_comes_from_the_rounds_that_decide(monkeypatch):
    """Here the second round alone."""
    monkeypatch.setattr("sbi_jeffreys.training.data._DECIDING_PAIRS", 3)
    inference = second_round(trained())
    simulations = data.simulations_for_proxy(inference, 0)
    first, second = (len(theta) for theta in inference._theta_roundwise)
    assert [len(theta) for theta in simulations.theta_by_rounds] == [first, second]
    assert bool((simulations.deciding >= first).all())
    assert set(simulations.deciding.tolist()) < set(simulations.train.tolist())


@pytest.mark.parametrize(
    ("deciding", "expected"),
    [(1, [False] * 2 + [True]), (7, [False] + [True] * 2), (50, [True] * 3)],
)
def test_so_many_of_the_latest_rounds_decide_that_there_are_enough_pairs(deciding, expected):
    """Three held-out pairs of the last round, seven of the one before it, two of the first one."""
    rounds = torch.tensor([0] * 2 + [1] * 7 + [2] * 3)
    which = latest(rounds, deciding)
    assert [bool(which[rounds == r].all()) for r in range(3)] == expected
    assert [bool(which[rounds == r].any()) for r in range(3)] == expected


def test_the_latest_rounds_decide(monkeypatch):
    monkeypatch.setattr("sbi_jeffreys.training.data._DECIDING_PAIRS", 3)
    seen, held_out_pairs = [], data.held_out_pairs

    def held_out(*arguments):
        seen.append(held_out_pairs(*arguments))
        return seen[-1]

    monkeypatch.setattr(data, "held_out_pairs", held_out)
    inference = second_round(trained())
    first, second = (set(theta[:, 0].tolist()) for theta in inference._theta_roundwise)
    assert set(seen[0].theta[:, 0].tolist()) < first
    assert set(seen[-1].theta[:, 0].tolist()) < second


def test_calibration_kernel_weighs_the_pool():
    """No pool observation with a negative first output is ever drawn."""
    inference = fresh().append_simulations(*simulate())
    train(inference, calibration_kernel=lambda x: (x[:, 0] > 0).float())
    stage = inference._training.stage
    assert torch.equal(stage.pool.weights, (stage.pool.x[:, 0] > 0).float())
    rows = torch.multinomial(stage.pool.weights, 500, replacement=True)
    assert bool((stage.pool.x[rows, 0] > 0).all())


@pytest.mark.parametrize("at_simulations", [1.0, 0.0])
def test_calibration_kernel_that_excludes_every_draw_leaves_plain_npe(at_simulations):
    """It is one at simulations, of which no draw is one exactly, or zero everywhere."""
    inference = fresh().append_simulations(*simulate())
    simulations = inference.get_simulations()[1]

    def kernel(x):
        return at_simulations * (x.unsqueeze(1) == simulations).all(dim=2).any(dim=1)

    with pytest.warns(UserWarning, match="calibration_kernel"):
        inference.train(max_num_epochs=2, calibration_kernel=kernel)
    assert inference.summary["trust"] == []
    assert draws(inference).shape == (20, 2)


def test_nan_padded_trials():
    trial_net = FCEmbedding(input_dim=2, output_dim=4, num_layers=1, num_hiddens=8)
    embedding = PermutationInvariantEmbedding(trial_net, trial_net_output_dim=4, output_dim=4)
    builder = posterior_nn("maf", embedding_net=embedding, z_score_x="none")
    theta = PRIOR.sample((60,))
    x = theta.unsqueeze(1) + 0.3 * torch.randn(60, 5, 2)
    x[::2, 3:] = torch.nan
    inference = fresh(builder)
    inference.append_simulations(theta, x, exclude_invalid_x=False)
    train(inference)
    assert inference.summary["proxy"][0].startswith("energy")
    assert len(inference.summary["trust"]) == 2
    posterior = inference.build_posterior()
    assert posterior.sample((5,), x=x[1:2], show_progress_bars=False).shape == (5, 2)


@pytest.mark.parametrize("z_score_x", ["none", "independent", "structured"])
@pytest.mark.parametrize("z_score_theta", ["none", "structured", "transform_to_unconstrained"])
def test_z_scoring_builders(z_score_x, z_score_theta):
    unconstrained = z_score_theta == "transform_to_unconstrained"
    model, extra = ("zuko_maf", {"x_dist": PRIOR}) if unconstrained else ("maf", {})
    builder = posterior_nn(model, z_score_x=z_score_x, z_score_theta=z_score_theta, **extra)
    assert draws(trained(builder)).shape == (20, 2)


def test_dataloader_kwargs_reach_the_loader():
    def collate(rows):
        sizes.append(len(rows))
        return default_collate(rows)

    sizes: list[int] = []
    trained(dataloader_kwargs={"collate_fn": collate, "batch_size": 4, "drop_last": False})
    assert max(sizes) == 4


def test_clipping_can_be_turned_off():
    assert bool(torch.isfinite(weights(trained(clip_max_norm=None))).all())


def test_train_summary_is_printed_once(capsys):
    inference = fresh().append_simulations(*simulate())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inference.train(max_num_epochs=2, show_train_summary=True)
    assert capsys.readouterr().out.count("ROUND 1 STATS") >= 1


def test_data_device_apart_from_training_device():
    inference = fresh()
    inference.append_simulations(*simulate(), data_device="cpu")
    train(inference)
    assert len(inference.summary["trust"]) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("proxy", ["likelihood", "energy"])
def test_cuda(proxy):
    prior = MultivariateNormal(torch.zeros(2).cuda(), torch.eye(2).cuda())
    inference = fresh(options=replace(TINY, proxy=proxy), prior=prior, device="cuda")
    inference.append_simulations(*simulate(60, prior), data_device="cpu")
    train(inference)
    assert {p.device.type for p in inference.proxy.parameters()} == {"cuda"}
    posterior = inference.build_posterior()
    assert posterior.sample((5,), x=X_O.cuda(), show_progress_bars=False).device.type == "cuda"
    corrected = inference.build_corrected_posterior(100)
    assert corrected.sample((5,), x=X_O.cuda(), show_progress_bars=False).device.type == "cuda"


@pytest.mark.parametrize(
    "prior",
    [Uniform(torch.zeros(1), torch.ones(1)), Normal(torch.zeros(1), torch.ones(1))],
    ids=["bounded", "unbounded"],
)
def test_a_prior_over_one_parameter_as_torch_writes_it(prior):
    """sbi takes it, although its log density is one number per component: there is one."""
    torch.manual_seed(0)
    inference = fresh(prior=prior)
    theta = prior.sample((60,))
    x = theta + 0.3 * torch.randn_like(theta)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The proposal you passed")
        inference.append_simulations(theta, x, proposal=prior)
    train(inference)
    assert _sbi.latest_round(inference) == 0
    posterior = inference.build_posterior()
    drawn = posterior.sample((50,), x=x[0], show_progress_bars=False)
    assert drawn.shape == (50, 1)
    assert posterior.log_prob(drawn, x=x[0]).shape == (50,)
    assert inference.build_corrected_posterior().log_prob(drawn, x=x[0]).shape == (50,)

"""Where the main is built: in the prior's unconstrained space, unless that was not asked for."""

import pickle
import warnings

import pytest
import torch
from contract_tools import PRIOR, simulate, train, trained
from sbi.neural_nets import posterior_nn
from sbi.neural_nets.embedding_nets import FCEmbedding
from sbi.utils import BoxUniform
from torch.distributions import MultivariateNormal

from sbi_jeffreys import JeffreysOptions, JeffreysWarning, MainBuilder, NPE_Jeffreys
from sbi_jeffreys.networks.builders import UnconstrainedDensityEstimator
from sbi_jeffreys.training import own_space


def corner(num: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """θ in a corner of the box, where an unaware network leaks half of its mass."""
    torch.manual_seed(0)
    theta = 0.9 + 0.1 * torch.rand(num, 2)
    return theta, theta + 0.1 * torch.randn_like(theta)


@pytest.mark.parametrize("marginal_transforms", [True, False])
def test_our_builder_with_an_embedding_net_cannot_leak(marginal_transforms, monkeypatch):
    monkeypatch.setattr(own_space, "_MARGIN", float("inf"))  # what the builder made is kept
    theta, x = corner()
    builder = MainBuilder("maf", FCEmbedding(2, 2), marginal_transforms=marginal_transforms)
    inference = NPE_Jeffreys(
        PRIOR, builder, show_progress_bars=False, options=JeffreysOptions(num_steps=0)
    )
    net = inference.append_simulations(theta, x).train(max_num_epochs=5)
    draws = net.sample(torch.Size((200,)), x[:20]).reshape(-1, 2)
    inside = ((draws >= -1) & (draws <= 1)).all(-1).float().mean()
    assert isinstance(net, UnconstrainedDensityEstimator) == marginal_transforms
    assert (float(inside) == 1.0) == marginal_transforms


def own(theta, x):
    return posterior_nn("maf")(theta, x)


@pytest.mark.parametrize("builder", [own, posterior_nn("maf")])
def test_another_builder_is_used_as_it_is_with_a_warning(builder):
    with pytest.warns(JeffreysWarning, match=r"outside the prior's support.*MainBuilder"):
        inference = NPE_Jeffreys(PRIOR, builder, show_progress_bars=False)
    assert inference._build_neural_net is builder


def test_without_a_bounded_prior_another_builder_loses_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error", JeffreysWarning)
        NPE_Jeffreys(MultivariateNormal(torch.zeros(2), torch.eye(2)), own)
        NPE_Jeffreys(None, own)


def test_an_unbounded_prior_needs_no_transform():
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
    net = MainBuilder("maf").with_prior(prior)(*corner())
    assert not isinstance(net, UnconstrainedDensityEstimator)


@pytest.mark.parametrize("model", ["mdn", "maf"])
def test_a_mixture_models_theta_itself(model):
    net = MainBuilder(model).with_prior(PRIOR)(*corner())
    assert isinstance(net, UnconstrainedDensityEstimator) == (model == "maf")


def test_theta_that_sbi_transforms_is_not_transformed_twice():
    theta, x = corner()
    settings = {"z_score_theta": "transform_to_unconstrained", "x_dist": PRIOR}
    net = MainBuilder("zuko_nsf", **settings).with_prior(PRIOR)(theta, x)
    assert not isinstance(net, UnconstrainedDensityEstimator)
    assert float(net.log_prob(theta.unsqueeze(0), x).mean()) > -20


def test_names_are_taken_in_any_case():
    assert MainBuilder("MAF").model == MainBuilder("maf").model


def test_settings_reach_the_network():
    sizes = [
        sum(p.numel() for p in MainBuilder("maf", hidden_features=h)(*corner()).parameters())
        for h in (10, 50)
    ]
    assert sizes[1] > 2 * sizes[0]


def test_a_second_network_does_not_start_from_the_trained_embedding():
    embedding = FCEmbedding(2, 2)
    builder = MainBuilder("maf", embedding)
    first = builder(*corner())
    with torch.no_grad():
        for p in first.embedding_net.parameters():
            p.add_(1.0)
    parameters = [p for p in builder(*corner()).embedding_net.parameters() if p.requires_grad]
    assert len(parameters) == len(list(embedding.parameters()))
    for ours, theirs in zip(parameters, embedding.parameters()):
        assert torch.equal(ours, theirs)


def test_the_builder_survives_pickling_and_builds_again():
    inference = pickle.loads(pickle.dumps(trained(MainBuilder("maf", FCEmbedding(2, 2)))))
    inference.append_simulations(*simulate())
    train(inference, retrain_from_scratch=True, force_first_round_loss=True)
    assert isinstance(inference._neural_net, UnconstrainedDensityEstimator)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("nfs",), ValueError, "density_estimator .*nsf.* got 'nfs'"),
        ((3,), TypeError, "model must be a name"),
        ((own,), TypeError, "model must be a name"),
        (("nsf", 3), TypeError, "embedding_net must be of type Module, got int"),
        (("nsf", None, 1), TypeError, "marginal_transforms must be a bool"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        MainBuilder(*arguments)


@pytest.mark.parametrize("unit", [1e-12, 1e-8, 1e-3, 1e9])
def test_the_unit_of_x_does_not_matter(unit):
    """sbi's own z-scoring takes a standard deviation of 1e-12 for zero."""
    torch.manual_seed(0)
    theta = 2 * torch.rand(100, 2) - 1
    x = theta + 0.2 * torch.randn(100, 2)
    values = []
    for factor in (1.0, unit):
        torch.manual_seed(1)
        main = MainBuilder("maf")(theta, factor * x)
        values.append(main.log_prob(theta.unsqueeze(0), factor * x)[0])
    torch.testing.assert_close(values[1], values[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("model", ["mdn", "zuko_ncsf", "mnpe"])
def test_some_models_are_of_theta_as_it_is(model):
    """A circular flow is periodic: in unconstrained space it would integrate to infinity."""
    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    assert MainBuilder(model).with_prior(prior)._prior_transform() is None
    assert MainBuilder("zuko_nsf").with_prior(prior)._prior_transform() is not None

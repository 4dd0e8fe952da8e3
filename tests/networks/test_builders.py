"""Where the main is built: in the prior's unconstrained space, unless that was not asked for."""

import pytest
import torch
from contract_tools import PRIOR, fresh, trained
from sbi.neural_nets import posterior_nn
from sbi.neural_nets.embedding_nets import FCEmbedding
from torch.distributions import MultivariateNormal

from sbi_jeffreys import JeffreysOptions, NPE_Jeffreys
from sbi_jeffreys.networks.estimators import (
    NamedBuilder,
    UnconstrainedBuilder,
    UnconstrainedDensityEstimator,
)


def corner(num: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """θ in a corner of the box, where an unaware network leaks half of its mass."""
    torch.manual_seed(0)
    theta = 0.9 + 0.1 * torch.rand(num, 2)
    return theta, theta + 0.1 * torch.randn_like(theta)


@pytest.mark.parametrize("marginal_transforms", [True, False])
def test_a_builder_of_sbis_cannot_leak(marginal_transforms):
    theta, x = corner()
    builder = posterior_nn("maf", embedding_net=FCEmbedding(2, 2))
    options = JeffreysOptions(num_steps=0, marginal_transforms=marginal_transforms)
    inference = NPE_Jeffreys(PRIOR, builder, show_progress_bars=False, options=options)
    net = inference.append_simulations(theta, x).train(max_num_epochs=5)
    draws = net.sample(torch.Size((200,)), x[:20]).reshape(-1, 2)
    inside = ((draws >= -1) & (draws <= 1)).all(-1).float().mean()
    assert isinstance(net, UnconstrainedDensityEstimator) == marginal_transforms
    assert (float(inside) == 1.0) == marginal_transforms


def own(theta, x):
    return posterior_nn("maf")(theta, x)


@pytest.mark.parametrize(
    "builder",
    [
        own,
        NamedBuilder("maf", PRIOR),
        posterior_nn("mdn"),
        posterior_nn("maf", z_score_theta="none"),
        posterior_nn("maf", z_score_theta="transform_to_unconstrained", x_dist=PRIOR),
    ],
)
def test_other_builders_are_used_as_they_come(builder):
    assert UnconstrainedBuilder.wrap(builder, PRIOR) is builder


def test_an_unbounded_prior_needs_no_transform():
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
    builder = UnconstrainedBuilder.wrap(posterior_nn("maf"), prior)
    assert not isinstance(builder(*corner()), UnconstrainedDensityEstimator)


def test_a_wrapped_builder_is_forgotten_in_pickles_as_sbis_is(tmp_path):
    inference = trained(posterior_nn("maf"))
    inference.save(tmp_path / "inference.pt")
    loaded = NPE_Jeffreys.load(tmp_path / "inference.pt")
    assert isinstance(loaded._neural_net, UnconstrainedDensityEstimator)
    with pytest.raises(RuntimeError, match="by name"):
        loaded.train(retrain_from_scratch=True, force_first_round_loss=True)
    assert isinstance(fresh(posterior_nn("maf"))._build_neural_net, UnconstrainedBuilder)

"""The divergences against analytic values of Gaussians, asymmetric: directions cannot swap."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from sbi_jeffreys import objective

# An asymmetric pair: KL(p‖q) = 0.893…, KL(q‖p) = 1.807…
P, Q = Normal(0.5, 1.0), Normal(-0.5, 0.6)
K = 200_000


def standard_error(values: torch.Tensor) -> float:
    return float(values.std() / len(values) ** 0.5)


def test_the_pair_is_asymmetric():
    assert abs(float(kl_divergence(P, Q) - kl_divergence(Q, P))) > 0.5


def test_forward_term_minus_entropy_is_forward_kl():
    theta = Q.sample((K,))  # Q plays the simulator, P the main
    value = objective.forward_term(P.log_prob(theta)) - Q.entropy()
    tolerance = 4 * standard_error(P.log_prob(theta))
    assert abs(float(value - kl_divergence(Q, P))) < tolerance
    assert abs(float(value - kl_divergence(P, Q))) > 10 * tolerance


def test_reverse_term_is_reverse_kl_with_unnormalised_proxy():
    theta = P.sample((K, 1))
    log_z = 1.7  # q̃ = e^1.7 q
    ratio = objective.reverse_term(P.log_prob(theta), Q.log_prob(theta) + log_z, log_z)
    tolerance = 4 * standard_error((P.log_prob(theta) - Q.log_prob(theta))[:, 0])
    assert ratio.shape == (1,)
    assert abs(float(ratio) - float(kl_divergence(P, Q))) < tolerance
    assert abs(float(ratio) - float(kl_divergence(Q, P))) > 10 * tolerance


def test_log_normaliser_recovers_a_known_constant():
    theta = Normal(0.0, 2.0).sample((K, 3))
    log_q = Q.log_prob(theta) + torch.tensor([0.0, 1.0, -2.0])
    log_z = objective.log_normaliser(log_q, Normal(0.0, 2.0).log_prob(theta))
    torch.testing.assert_close(log_z, torch.tensor([0.0, 1.0, -2.0]), atol=0.02, rtol=0)


def test_log_normaliser_without_mass_is_minus_infinity():
    assert objective.log_normaliser(torch.full((4, 1), -torch.inf), torch.zeros(4, 1)) == -torch.inf


def test_proxy_fit_is_normalised_nll():
    log_q = torch.tensor([-1.0, -3.0])
    assert objective.proxy_fit(log_q, torch.tensor([0.5, 0.5])).item() == pytest.approx(2.5)


def gaussian_kl_gradient(mean: float, scale: float) -> tuple[float, float]:
    """∂/∂(mean, scale) of KL(N(mean, scale²) ‖ Q) in closed form."""
    return (mean + 0.5) / 0.36, scale / 0.36 - 1 / scale


@pytest.mark.parametrize("num_samples", [2, 16])
def test_vargrad_gradient_is_that_of_the_reverse_kl(num_samples):
    mean, scale = torch.tensor(0.5, requires_grad=True), torch.tensor(0.8, requires_grad=True)
    batch = K // num_samples
    theta = Normal(0.5, 0.8).sample((num_samples, batch))
    loss = objective.reverse_vargrad_loss(
        Normal(mean, scale).log_prob(theta), Q.log_prob(theta) + 3.0, barrier=100.0
    )
    gradient = torch.autograd.grad(loss, (mean, scale))
    # Per-observation spread of the estimator, measured: < 12 at K = 2.
    tolerance = 4 * 12 / batch**0.5
    for value, truth in zip(gradient, gradient_of := gaussian_kl_gradient(0.5, 0.8)):
        assert abs(float(value) - truth) < tolerance, (gradient, gradient_of)


def test_vargrad_vanishes_sample_by_sample_at_the_optimum():
    scale = torch.tensor(0.6, requires_grad=True)
    theta = Q.sample((3, 5))
    loss = objective.reverse_vargrad_loss(
        Normal(-0.5, scale).log_prob(theta), Q.log_prob(theta) - 9
    )
    assert float(loss) < 1e-9
    assert abs(float(torch.autograd.grad(loss, scale)[0])) < 1e-4


def test_barrier_caps_value_but_keeps_gradient():
    log_p = torch.zeros(4, 1, requires_grad=True)
    log_q = torch.tensor([[0.0], [0.0], [-torch.inf], [-500.0]])
    ratio = objective.robust_log_ratio(log_p, log_q, barrier=5.0)
    torch.testing.assert_close(ratio.detach(), torch.tensor([[0.0], [0.0], [5.0], [5.0]]))
    assert bool((torch.autograd.grad(ratio.sum(), log_p)[0] == 1).all())


def test_one_sample_in_the_proxys_mass_does_not_decide_a_step():
    log_p = torch.zeros(4, 1, requires_grad=True)
    log_q = torch.tensor([[-1000.0], [-1003.0], [-1001.0], [-2.0]])
    ratio = objective.robust_log_ratio(log_p, log_q, barrier=5.0)
    expected = torch.tensor([[1000.0], [1003.0], [1001.0], [995.0]])
    torch.testing.assert_close(ratio.detach(), expected)
    loss = objective.reverse_vargrad_loss(log_p, log_q, barrier=5.0)
    gradient = torch.autograd.grad(loss, log_p)[0][:, 0]
    assert float(gradient[3]) < 0  # descent raises log p there
    assert float(gradient.abs().max()) < 5


def test_barrier_prices_an_observation_with_every_sample_outside():
    log_p = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    log_q = torch.tensor([[2.0, -torch.inf], [2.0, -torch.inf]])
    ratio = objective.robust_log_ratio(log_p, log_q, barrier=5.0)
    torch.testing.assert_close(ratio, torch.tensor([[-2.0, 3.0], [-2.0, 3.0]]))


def test_leaked_samples_lose_density_under_vargrad():
    log_p = torch.zeros(2, 1, requires_grad=True)
    loss = objective.reverse_vargrad_loss(log_p, torch.tensor([[0.0], [-torch.inf]]))
    inside, outside = torch.autograd.grad(loss, log_p)[0][:, 0]
    assert outside > 0 > inside  # descent lowers log p outside and raises it inside


def test_vargrad_needs_two_samples():
    with pytest.raises(ValueError, match="at least two samples"):
        objective.reverse_vargrad_loss(torch.zeros(1, 3), torch.zeros(1, 3))


def test_reweighted_forward_term_estimates_cross_entropy_of_the_proxy():
    theta = P.sample((K, 1))
    value = objective.reweighted_forward_term(P.log_prob(theta), Q.log_prob(theta) + 5)
    truth = Q.entropy() + kl_divergence(Q, P)  # E_q[−log p]
    assert abs(float(value - truth)) < 0.03
    assert abs(float(value - P.entropy())) > 0.1  # what unweighted samples would give


def test_reweighted_forward_term_ignores_observations_without_mass():
    log_p = torch.zeros(3, 1, requires_grad=True)
    value = objective.reweighted_forward_term(log_p, torch.full((3, 1), -torch.inf))
    assert float(value) == 0


def test_ranking_nce_known_value_and_direction():
    losses = objective.ranking_nce_losses(torch.tensor([0.0, 2.0]), torch.zeros(3, 2))
    torch.testing.assert_close(losses, torch.tensor([math.log(4.0), math.log(math.exp(2) + 3) - 2]))


def test_truncated_weights_cap_the_largest_and_normalise():
    log_weights = torch.zeros(100)
    log_weights[0] = 20.0
    weights = objective.truncated_log_weights(log_weights).exp()
    assert float(weights.sum()) == pytest.approx(1.0)
    raw = torch.softmax(log_weights, 0)
    assert float(weights[1] / raw[1]) == pytest.approx(10.0, rel=1e-3)  # w̄√K = max/10


def test_effective_sample_size_of_equal_and_degenerate_weights():
    assert float(objective.effective_sample_size(torch.full((50,), 3.0))) == pytest.approx(50.0)
    one = torch.full((50,), -torch.inf)
    one[3] = 0.0
    assert float(objective.effective_sample_size(one)) == pytest.approx(1.0)
    assert float(objective.effective_sample_size(torch.full((5,), -torch.inf))) == 0.0


@pytest.mark.parametrize("constant", [1e5, -1e5, 1e6])
def test_effective_sample_size_knows_weights_up_to_a_factor(constant):
    """In float32 the weights themselves are rounded: to 1/16 at 1e6."""
    torch.manual_seed(0)
    log_weights = torch.randn(1000, 3)
    expected = objective.effective_sample_size(log_weights)
    found = objective.effective_sample_size(log_weights + constant)
    assert torch.allclose(found, expected, rtol=0.02)
    assert bool((objective.effective_sample_size(3e8 * torch.rand(1000, 3)) <= 1000).all())

"""Given proxies: the exact likelihood makes R the true reverse KL; sbi's NLE and NRE as proxies."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from sbi.neural_nets import classifier_nn, likelihood_nn
from sbi.utils import BoxUniform, MultipleIndependent
from torch import Tensor, nn
from torch.distributions import Dirichlet, MultivariateNormal, kl_divergence

from sbi_jeffreys._checks import JeffreysWarning
from sbi_jeffreys.objective import reverse_term
from sbi_jeffreys.options import JeffreysOptions
from sbi_jeffreys.proxies import LikelihoodProxy, build_proxy
from sbi_jeffreys.proxies.given import GivenProxy

NOISE = 0.5
MIX = torch.tensor([[1.0, 0.3], [0.0, 0.8], [0.5, -0.5]])  # x = MIX θ + noise, in 3 dimensions


def prior() -> MultivariateNormal:
    return MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.4], [0.4, 2.0]]))


def log_likelihood(theta: Tensor, x: Tensor) -> Tensor:
    residual = (x - theta @ MIX.T) / NOISE
    return -0.5 * (residual**2).sum(-1) - 3 * math.log(NOISE * math.sqrt(2 * math.pi))


def simulate(theta: Tensor) -> Tensor:
    return theta @ MIX.T + NOISE * torch.randn(len(theta), 3)


def posterior_and_evidence(x: Tensor) -> tuple[MultivariateNormal, Tensor]:
    precision = prior().precision_matrix + MIX.T @ MIX / NOISE**2
    covariance = torch.linalg.inv(precision)
    posterior = MultivariateNormal(x @ MIX @ covariance / NOISE**2, covariance)
    marginal = MIX @ prior().covariance_matrix @ MIX.T + NOISE**2 * torch.eye(3)
    return posterior, MultivariateNormal(torch.zeros(3), marginal).log_prob(x)


class LikelihoodModule(nn.Module):
    def forward(self, theta: Tensor, x: Tensor) -> Tensor:
        return log_likelihood(theta, x)


def test_exact_likelihood_gives_the_true_reverse_divergence():
    x = simulate(prior().sample((4,)))
    posterior, log_z = posterior_and_evidence(x)
    # Wrong in place and, unequally, in scale: the two directions of KL differ by a factor.
    main = MultivariateNormal(posterior.mean + 0.1, torch.diag(torch.tensor([0.01, 0.6])))
    reverse, forward = kl_divergence(main, posterior), kl_divergence(posterior, main)
    num = 20_000
    theta = main.sample((num,))
    log_p, log_q = main.log_prob(theta), GivenProxy(prior(), log_likelihood).log_potential(theta, x)
    estimate = reverse_term(log_p, log_q, log_z)
    error = (log_p - log_q).std(dim=0) / math.sqrt(num)
    assert ((estimate - reverse).abs() < 4 * error).all()
    assert ((estimate - forward).abs() > 20 * error).all()


def test_zero_divergence_at_the_posterior_itself():
    x = simulate(prior().sample((3,)))
    posterior, log_z = posterior_and_evidence(x)
    theta = posterior.sample((5,))
    log_q = GivenProxy(prior(), log_likelihood).log_potential(theta, x)
    torch.testing.assert_close(log_q - log_z, posterior.log_prob(theta), atol=1e-4, rtol=1e-4)


def test_minus_infinity_outside_a_box_and_where_the_likelihood_says_so():
    box = BoxUniform(-torch.ones(2), torch.ones(2))
    seen = []

    def half(theta: Tensor, x: Tensor) -> Tensor:
        seen.append(theta)
        return torch.where(theta[:, 0] > 0, torch.zeros(len(theta)), -torch.inf)

    proxy = GivenProxy(box, half)
    theta = torch.tensor([[0.5, 0.5], [-0.5, 0.5], [1.5, 0.0]]).unsqueeze(0)
    value = proxy.log_potential(theta, torch.zeros(3, 1))[0]
    torch.testing.assert_close(value, torch.tensor([-math.log(4.0), -math.inf, -math.inf]))
    assert (torch.cat(seen).abs() <= 1).all()  # never asked outside the prior


def test_large_batches_are_cut_and_image_shaped_x_is_passed_on():
    shapes = []

    def record(theta: Tensor, x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return x.flatten(1).sum(1) + theta[:, 0]

    theta, x = torch.randn(300, 100, 2), torch.randn(100, 2, 3)
    value = GivenProxy(prior(), record).log_factor(theta, x)
    torch.testing.assert_close(value, theta[..., 0] + x.sum((1, 2)))
    assert len(shapes) == 2
    assert all(s[1:] == (2, 3) for s in shapes)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda t, x: log_likelihood(t, x).unsqueeze(1), ValueError, r"got \(6, 1\)"),
        (lambda t, x: log_likelihood(t, x).sum(), ValueError, r"shape \(6,\).*got \(\)"),
        (lambda t, x: log_likelihood(t, x) * math.nan, ValueError, "NaN or .inf for 6 of 6"),
        (lambda t, x: log_likelihood(t, x) + math.inf, ValueError, "return -inf where"),
        (lambda t, x: log_likelihood(t, x).numpy(), TypeError, "got ndarray"),
    ],
)
def test_functions_that_break_the_contract(function, error, message):
    proxy = GivenProxy(prior(), function)
    with pytest.raises(error, match=message):
        proxy.log_factor(torch.zeros(2, 3, 2), torch.zeros(3, 3))


def test_lost_gradient_is_reported_where_it_is_needed_only():
    proxy = GivenProxy(prior(), lambda t, x: log_likelihood(t.detach(), x))
    theta, x = torch.zeros(1, 2, 2, requires_grad=True), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="without a gradient to theta"):
        proxy.log_potential(theta, x)
    with torch.no_grad():
        assert torch.isfinite(proxy.log_potential(theta, x)).all()
    gradient = torch.autograd.grad(
        GivenProxy(prior(), log_likelihood).log_potential(theta, x).sum(), theta
    )[0]
    assert torch.isfinite(gradient).all()


def test_fit_tries_the_function_on_the_simulations():
    theta = prior().sample((50,))
    x, rows = simulate(theta), torch.arange(50)
    assert GivenProxy(prior(), log_likelihood).fit(theta, x, rows[:40], rows[40:]) is not None
    impossible = GivenProxy(prior(), lambda t, x: torch.full((len(t),), -math.inf))
    with pytest.raises(ValueError, match="at all of the 40 simulations"):
        impossible.fit(theta, x, rows[:40], rows[40:])


def test_wrong_objects_are_named():
    with pytest.raises(TypeError, match=r"log_likelihood must be callable.*from_nle"):
        GivenProxy(prior(), 3.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sample_x must be callable"):
        GivenProxy(prior(), log_likelihood, sample_x=[1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Linear has no log_prob and no sample"):
        GivenProxy.from_nle(prior(), nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"has no unnormalized_log_ratio.*train\(\)"):
        GivenProxy.from_nre(prior(), nn.Linear(2, 2))
    with pytest.raises(TypeError, match="is no torch module"):
        GivenProxy.from_nle(prior(), prior())


def test_pairs_from_a_sampler():
    proxy = GivenProxy(prior(), log_likelihood, sample_x=simulate)
    assert proxy.can_sample
    theta, x = proxy.sample_joint(2_000)
    joint = torch.cov(torch.cat([theta, x], dim=1).T)
    torch.testing.assert_close(joint[2:, :2], MIX @ prior().covariance_matrix, atol=0.3, rtol=0)
    without = GivenProxy(prior(), log_likelihood)
    assert not without.can_sample
    with pytest.raises(NotImplementedError, match="pass sample_x"):
        without.sample_joint(3)
    broken = GivenProxy(prior(), log_likelihood, sample_x=lambda t: torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"shape \(5, \*x_shape\).*got \(2, 3\)"):
        broken.sample_joint(5)


def test_failed_draws_are_dropped_but_padded_trials_kept():
    def vector(theta: Tensor) -> Tensor:
        x = simulate(theta)
        x[0, 1], x[1, 0] = math.nan, math.inf
        return x

    def trials(theta: Tensor) -> Tensor:
        x = torch.zeros(len(theta), 4, 1)
        x[0, 2:], x[1] = math.nan, math.nan
        return x

    assert len(GivenProxy(prior(), log_likelihood, sample_x=vector).sample_joint(10)[0]) == 8
    assert len(GivenProxy(prior(), log_likelihood, sample_x=trials).sample_joint(10)[1]) == 9


def test_nle_agrees_with_the_estimator_and_leaves_it_alone():
    theta = prior().sample((200,))
    x = simulate(theta)
    estimator = likelihood_nn("maf")(theta, x)
    proxy = GivenProxy.from_nle(prior(), estimator)
    theta_k = prior().sample((7, 5))
    expected = estimator.log_prob(x[:5].expand(7, 5, 3).reshape(1, 35, 3), theta_k.reshape(35, 2))
    torch.testing.assert_close(proxy.log_factor(theta_k, x[:5]), expected.reshape(7, 5))
    potential = proxy.log_potential(theta_k, x[:5])
    torch.testing.assert_close(potential, expected.reshape(7, 5) + prior().log_prob(theta_k))
    assert all(p.requires_grad for p in estimator.parameters() if p.is_floating_point())
    theta_drawn, x_drawn = proxy.sample_joint(30)
    assert theta_drawn.shape == (30, 2)
    assert x_drawn.shape == (30, 3)


def test_nre_agrees_with_the_estimator_up_to_nan():
    theta = prior().sample((200,))
    x = simulate(theta)
    ratio = classifier_nn("resnet")(theta, x)
    proxy = GivenProxy.from_nre(prior(), ratio)
    theta_k = prior().sample((7, 5))
    expected = ratio.unnormalized_log_ratio(theta_k, x[:5].expand(7, 5, 3))
    torch.testing.assert_close(proxy.log_factor(theta_k, x[:5]), expected)
    assert not proxy.can_sample
    theta_k[0, 0] = math.nan
    assert proxy.log_factor(theta_k, x[:5])[0, 0] == -math.inf


def test_copies_and_pickles_agree():
    theta = prior().sample((100,))
    x = simulate(theta)
    proxies = [
        GivenProxy(prior(), LikelihoodModule()),
        GivenProxy.from_nle(prior(), likelihood_nn("maf")(theta, x)),
        GivenProxy.from_nre(prior(), classifier_nn("mlp")(theta, x)),
    ]
    for proxy in proxies:
        value = proxy.log_potential(theta[:6].unsqueeze(0), x[:6])
        for other in (copy.deepcopy(proxy), pickle.loads(pickle.dumps(proxy))):
            assert torch.equal(other.log_potential(theta[:6].unsqueeze(0), x[:6]), value)
            assert other.can_sample == proxy.can_sample


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (lambda t: t.repeat(1, 2)[:, :3] * 1e38, "far from all of them"),
        (lambda t: torch.full((len(t), 3), math.inf), "not finite"),
        (lambda t: torch.full((len(t), 3), math.nan), "not finite"),
        (lambda t: 1000 * simulate(t), r"far from all of them .10 times their range."),
        (lambda t: simulate(t)[:, :2], r"must return x of the simulations' shape \(N, 3\)"),
        (lambda t: simulate(t)[:5], r"one x for each theta, got \(5, 3\)"),
    ],
)
def test_a_sampler_unlike_the_simulations_is_named_before_training(sampler, message):
    theta = prior().sample((50,))
    rows = torch.arange(50)
    proxy = GivenProxy(prior(), log_likelihood, sample_x=sampler)
    with pytest.raises(ValueError, match=message):
        proxy.fit(theta, simulate(theta), rows[:40], rows[40:])


def test_the_simulator_itself_passes_and_the_random_stream_goes_on():
    theta = prior().sample((50,))
    x, rows = simulate(theta), torch.arange(50)
    torch.manual_seed(3)
    GivenProxy(prior(), log_likelihood, sample_x=simulate).fit(theta, x, rows[:40], rows[40:])
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))


class BrokenPrior(MultivariateNormal):
    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) * math.nan


def test_a_prior_without_a_density_is_named():
    broken = BrokenPrior(torch.zeros(2), torch.eye(2))
    theta = prior().sample((50,))
    x, rows = simulate(theta), torch.arange(50)
    for proxy in (GivenProxy(broken, log_likelihood), LikelihoodProxy(broken)):
        with pytest.raises(ValueError, match=r"prior.log_prob must be finite.*at 40 of 40"):
            proxy.fit(theta, x, rows[:40], rows[40:])


def choose(given, trainers):
    options = JeffreysOptions(proxy=GivenProxy(given, log_likelihood))
    build_proxy(trainers, None, torch.randn(5, 3), options)  # type: ignore[arg-type]


def test_another_prior_than_the_trainers_is_a_warning():
    box, wide = (BoxUniform(-c * torch.ones(2), c * torch.ones(2)) for c in (1.0, 2.0))
    with pytest.warns(JeffreysWarning, match=r"\d+ of 1000 draws of it are outside the trainer's"):
        choose(wide, box)
    with pytest.warns(JeffreysWarning, match=r"draws of the trainer's are outside of it"):
        choose(box, wide)
    with pytest.warns(JeffreysWarning, match="log densities differ by"):
        choose(MultivariateNormal(torch.zeros(2), torch.eye(2)), prior())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose(prior(), prior())
        choose(box, BoxUniform(-torch.ones(2), torch.ones(2)))


def test_equal_joints_of_a_box_and_a_simplex_are_compared():
    """sbi's `within_support` cannot concatenate their supports."""
    equal, other = (
        MultipleIndependent([BoxUniform(torch.zeros(1), high), Dirichlet(torch.ones(3))])
        for high in (torch.ones(1), 2 * torch.ones(1))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose(equal, copy.deepcopy(equal))
    with pytest.warns(JeffreysWarning, match=r"\d+ of 1000 draws of it are outside the trainer's"):
        choose(other, equal)


def test_a_prior_of_double_precision_has_densities_of_the_simulations_precision():
    prior = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    proxy = GivenProxy(prior, lambda theta, x: -(theta - x).square().sum(-1))
    theta = torch.zeros(5, 3, 2)
    assert proxy.log_prior(theta).dtype == torch.float32
    assert proxy.log_potential(theta, torch.zeros(3, 2)).dtype == torch.float32

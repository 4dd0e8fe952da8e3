"""The likelihood proxy against a simulator whose likelihood is known."""

import copy
import pickle

import pytest
import torch
from sbi.utils import BoxUniform
from torch.distributions import MultivariateNormal, Normal, Poisson

from sbi_jeffreys.networks.fitting import FitConfig, FitResult, fit_network
from sbi_jeffreys.objective import log_normaliser
from sbi_jeffreys.options import JeffreysOptions
from sbi_jeffreys.proxies import (
    EnergyProxy,
    FlowExpert,
    LikelihoodProxy,
    RegressionExpert,
    build_proxy,
)
from sbi_jeffreys.proxies.stacking import stacking_weights

N, SCALE = 600, 0.5
TRAIN, VAL = torch.arange(0, 500), torch.arange(500, N)
QUICK = FitConfig(max_epochs=60, patience=10, batch_size=100)


@pytest.fixture(scope="module")
def fitted() -> tuple[LikelihoodProxy, torch.Tensor, torch.Tensor]:
    """x = θ + noise in two dimensions under a box prior, and a proxy fitted to it."""
    torch.manual_seed(1)
    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    theta = prior.sample((N,))
    x = theta + SCALE * torch.randn_like(theta)
    experts = (FlowExpert("maf", learning_rate=2e-3), FlowExpert("maf", 1.0, learning_rate=2e-3))
    proxy = LikelihoodProxy(prior, experts, QUICK)
    return proxy.fit(theta, x, TRAIN, VAL), theta, x


def test_the_point_inside_the_prior_does_not_seed_every_device(fitted, monkeypatch):
    proxy = copy.deepcopy(fitted[0])
    proxy._anchor = None
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded a GPU"))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeded every device"))
    before = torch.get_rng_state()
    proxy.log_potential(torch.zeros(1, 1, 2), torch.zeros(1, 2))
    assert proxy._anchor is not None
    assert torch.equal(before, torch.get_rng_state())


def fresh(num: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    theta = BoxUniform(-torch.ones(2), torch.ones(2)).sample((num,))
    return theta, theta + SCALE * torch.randn_like(theta)


def test_likelihood_is_close_to_the_exact_one(fitted):
    theta, x = fresh()
    estimate = fitted[0].log_factor(theta.unsqueeze(0), x)[0]
    exact = Normal(theta, SCALE).log_prob(x).sum(-1)
    kl = (exact - estimate).mean()
    assert 0 < float(kl) + 0.02 < 0.12  # nats; a fit on shuffled θ is 0.6 off
    shuffled = fitted[0].log_factor(theta[torch.randperm(2000)].unsqueeze(0), x)[0]
    assert float((exact - shuffled).mean()) > 0.4


def test_prior_is_exact(fitted):
    proxy = fitted[0]
    theta = torch.tensor([[0.0, 0.0], [1.01, 0.0], [50.0, -50.0]]).unsqueeze(1)
    log_q = proxy.log_potential(theta, torch.zeros(1, 2))[:, 0]
    assert torch.isfinite(log_q).tolist() == [True, False, False]
    inside = proxy.log_factor(theta[:1], torch.zeros(1, 2))[0, 0] - 2 * torch.tensor(2.0).log()
    assert float(log_q[0]) == pytest.approx(float(inside), abs=1e-5)


def test_gradient_survives_samples_outside_the_prior(fitted):
    theta = torch.tensor([[[0.1, 0.2]], [[9.0, 0.0]]], requires_grad=True)
    log_q = fitted[0].log_potential(theta, torch.zeros(1, 2))
    gradient = torch.autograd.grad(log_q[0, 0], theta)[0]
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient[0].abs().sum()) > 0


def test_joint_samples_follow_prior_and_likelihood(fitted):
    theta, x = fitted[0].sample_joint(4000)
    assert len(theta) == len(x) > 3800
    assert bool((theta.abs() <= 1).all())
    residual = x - theta
    assert residual.mean().abs() < 0.05
    assert float(residual.std()) == pytest.approx(SCALE, abs=0.06)


def test_an_expert_may_get_no_draws(fitted):
    """Weights near zero leave an expert without draws; a mixture of Gaussians cannot draw none."""
    torch.manual_seed(2)
    experts = (RegressionExpert(1), RegressionExpert(1, mixture=True))
    theta, x = fitted[1:]
    x = x + 2 * torch.randint(2, (len(x), 1))  # two components
    proxy = LikelihoodProxy(fitted[0].prior, experts, QUICK).fit(theta, x, TRAIN, VAL)
    for weights in torch.eye(len(proxy.fitted)):
        proxy.weights = weights
        theta, x = proxy.sample_joint(500)
        assert len(theta) == len(x) > 400
    assert len(proxy.fitted) == len(experts)


def test_normaliser_is_the_evidence(fitted):
    proxy = fitted[0]
    theta = proxy.prior.sample((20_000, 1))
    x = torch.tensor([[0.2, -0.1]])
    log_z = log_normaliser(proxy.log_potential(theta, x), proxy.log_prior(theta))
    exact = Normal(theta, SCALE).log_prob(x).sum(-1).exp().mean().log()
    assert abs(float(log_z - exact)) < 0.15


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_give_the_same_values(fitted, copy_of):
    theta, x = fresh(50)
    expected = fitted[0].log_potential(theta.unsqueeze(0), x)
    assert torch.equal(copy_of(fitted[0]).log_potential(theta.unsqueeze(0), x), expected)


def test_stacking_prefers_the_better_expert_and_drops_a_failed_one():
    good, bad = torch.randn(100), torch.randn(100) - 3
    failed = torch.full((100,), torch.nan)
    weights = stacking_weights(torch.stack([good, bad, failed]))
    assert weights[0] > 0.9
    assert weights[2] == 0
    assert float(weights.sum()) == pytest.approx(1.0)


def test_stacking_mixes_experts_that_complement_each_other():
    even = torch.where(torch.arange(100) % 2 == 0, 0.0, -4.0)
    weights = stacking_weights(torch.stack([even, -4.0 - even]))
    assert weights.tolist() == pytest.approx([0.5, 0.5], abs=0.01)


def test_stacking_without_any_finite_expert_says_so():
    with pytest.raises(RuntimeError, match="No expert of the likelihood proxy"):
        stacking_weights(torch.full((2, 10), torch.inf))


def test_counts_are_dequantised_and_sampled_as_counts():
    theta = MultivariateNormal(torch.zeros(1), torch.eye(1)).sample((N,))
    x = torch.cat([Poisson((1 + theta).exp()).sample(), torch.full((N, 1), 5.0)], dim=1)
    prior = MultivariateNormal(torch.zeros(1), torch.eye(1))
    proxy = LikelihoodProxy(prior, (FlowExpert("nsf", 0.3, 1e-3),), QUICK).fit(theta, x, TRAIN, VAL)
    _, drawn = proxy.sample_joint(200)
    assert torch.equal(drawn, drawn.round())
    assert bool((drawn[:, 1] == 5).all())
    # Equal up to the transform's Jacobian, a function of x: compare likelihood *ratios* in θ.
    a, b, counts = torch.full((1, 6, 1), 0.5), torch.full((1, 6, 1), -0.5), torch.arange(6.0)
    x_new = torch.stack([counts, torch.full((6,), 5.0)], dim=1)
    ratio = (proxy.log_factor(a, x_new) - proxy.log_factor(b, x_new))[0]
    exact = Poisson((1 + a[0, :, 0]).exp()).log_prob(counts)
    exact = exact - Poisson((1 + b[0, :, 0]).exp()).log_prob(counts)
    assert float((ratio - exact).abs().mean()) < 0.5  # the ratio itself spans 5 nats


def test_fit_keeps_the_best_held_out_weights():
    net = torch.nn.Linear(1, 1)
    trace: list[float] = []
    result = fit_network(
        net,
        lambda n, i, training: (n(torch.ones(len(i), 1))[:, 0] - (0.0 if training else 0.3)) ** 2,
        torch.arange(20),
        torch.arange(5),
        FitConfig(max_epochs=40, patience=40, batch_size=10, learning_rate=0.05),
        on_epoch=lambda epoch, value: trace.append(value),
    )
    assert result == FitResult(min(trace), 40, min(trace[:20]))
    assert float(((net(torch.ones(1, 1)) - 0.3) ** 2).detach()) == pytest.approx(
        min(trace), abs=1e-6
    )


@pytest.mark.parametrize(("held_out", "margin"), [(2.9, 0.4), (1.0, 1.0)])
def test_a_fit_is_abandoned_where_it_is_far_behind(held_out, margin):
    """0.4 nats behind at epoch 20, or half of what the rival gained after it, if that is more."""
    rival = FitResult(held_out, 60, early=3.0)
    assert rival.abandon_threshold == pytest.approx(3.0 + margin)
    assert FitResult(float("inf"), 0).abandon_threshold == float("inf")  # no rival yet
    for excess, epochs in ((0.01, 20), (-0.01, 30)):
        result = fit_network(
            torch.nn.Linear(1, 1),
            lambda n, i, training, e=excess: 0 * n(torch.ones(len(i), 1))[:, 0] + 3 + margin + e,
            torch.arange(20),
            torch.arange(5),
            FitConfig(max_epochs=30, patience=40),
            abandon_above=rival.abandon_threshold,
        )
        assert result.epochs == epochs


def test_fit_survives_non_finite_losses():
    net = torch.nn.Linear(1, 1)
    before = net.weight.detach().clone()
    result = fit_network(
        net,
        lambda n, i, training: n(torch.full((len(i), 1), torch.nan))[:, 0],
        torch.arange(4),
        torch.arange(4),
        FitConfig(max_epochs=2),
    )
    assert result.held_out == float("inf")
    assert torch.equal(net.weight, before)


@pytest.mark.parametrize(
    ("x", "reason"),
    [(torch.randn(9, 1, 4, 4), "not a vector"), (torch.full((9, 2), torch.nan), "NaN or inf")],
)
def test_x_without_a_density_is_refused_with_a_reason(x, reason):
    prior = BoxUniform(torch.zeros(1), torch.ones(1))
    with pytest.raises(ValueError, match=reason):
        build_proxy(prior, Main(), x, JeffreysOptions(proxy="likelihood"))  # type: ignore[arg-type]
    proxy, note = build_proxy(prior, Main(), x, JeffreysOptions())  # type: ignore[arg-type]
    assert isinstance(proxy, EnergyProxy)
    assert reason in note


class Main(torch.nn.Module):
    """As much of a main as `build_proxy` looks at."""

    def __init__(self, embedding_net: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.embedding_net = embedding_net


def test_auto_chooses_by_x_and_embedding():
    prior = BoxUniform(torch.zeros(1), torch.ones(1))

    def choice(main: Main, x: torch.Tensor) -> str:
        return build_proxy(prior, main, x, JeffreysOptions())[1]  # type: ignore[arg-type]

    assert choice(Main(), torch.randn(9, 2)) == "likelihood: vector x"
    pooled = "energy and likelihood of summaries: the main embeds x"
    assert choice(Main(torch.nn.Linear(2, 2)), torch.randn(9, 2)) == pooled
    assert choice(Main(), torch.randn(9, 2, 2)).startswith("energy: x has shape (2, 2)")
    assert "constant" in choice(Main(), torch.ones(9, 2))


@pytest.mark.parametrize(
    ("num", "config", "epochs"),
    [
        (900, FitConfig(), 1 + 10),  # nine steps an epoch
        (40, FitConfig(), 1 + 20),  # two: ten epochs would be too few steps
        (900, FitConfig(patience=4), 1 + 4),
        (900, FitConfig(patience_steps=None), 1 + 20),
    ],
)
def test_a_fit_waits_for_so_many_steps_without_gain(num, config, epochs):
    def loss(net, indices, training):
        fitted = net(torch.ones(len(indices), 1))[:, 0] ** 2
        return fitted if training else torch.ones(len(indices))

    net = torch.nn.Linear(1, 1)
    result = fit_network(net, loss, torch.arange(num), torch.arange(5), config)
    assert result.epochs == epochs

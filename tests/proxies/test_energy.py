"""Energy proxies against exact posteriors, over the kinds of x they exist for."""

import copy
import math
import pickle

import pytest
import torch
from sbi.neural_nets import posterior_nn
from sbi.neural_nets.embedding_nets import CNNEmbedding, FCEmbedding, PermutationInvariantEmbedding
from sbi.utils import BoxUniform
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.networks.embedding import embedded_once, summary_net
from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.proxies.energy import EnergyConfig, EnergyProxy
from sbi_jeffreys.proxies.partition import draw_atoms, draw_contrasts
from sbi_jeffreys.training.held_out import HeldOut

NOISE = 0.3
QUICK = FitConfig(learning_rate=2e-3, weight_decay=0.1, batch_size=100, max_epochs=15)


class WideMain(ConditionalDensityEstimator):
    """N(shrink · s(x), width²), deliberately wider than any posterior here."""

    def __init__(
        self, x: Tensor, embedding: nn.Module | None = None, dim: int = 2, width: float = 0.5
    ) -> None:
        super().__init__(nn.Identity(), torch.Size((dim,)), x.shape[1:])  # type: ignore[arg-type]
        self.embedding, self.width, self.calls = embedding or nn.Identity(), width, 0

    @property
    def embedding_net(self) -> nn.Module:
        return self.embedding

    def _density(self, condition: Tensor) -> Distribution:
        location = 0.9 * self.embedding(condition)[..., : self.input_shape[0]]
        return Independent(Normal(location, self.width), 1)

    def log_prob(self, input: Tensor, condition: Tensor, **kwargs) -> Tensor:
        num, batch = input.shape[:2]
        flat = condition.expand(num, *condition.shape).reshape(-1, *condition.shape[1:])
        return self._density(flat).log_prob(input.reshape(num * batch, -1)).reshape(num, batch)

    def sample(self, sample_shape: torch.Size, condition: Tensor, **kwargs) -> Tensor:
        return self._density(condition).sample(sample_shape)

    def loss(self, input: Tensor, condition: Tensor, **kwargs) -> Tensor:
        return -self.log_prob(input.unsqueeze(0), condition)[0]

    def sample_and_log_prob(self, sample_shape: torch.Size, condition: Tensor, **kwargs):
        raise NotImplementedError


def gaussian_pairs(num: int) -> tuple[MultivariateNormal, Tensor, Tensor]:
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
    theta = prior.sample((num,))
    return prior, theta, theta + NOISE * torch.randn_like(theta)


def exact_nll(theta: Tensor, x: Tensor) -> float:
    variance = 1 / (1 + 1 / NOISE**2)
    return float(
        -MultivariateNormal(x * variance / NOISE**2, variance * torch.eye(2)).log_prob(theta).mean()
    )


def fitted(
    prior: Distribution, theta: Tensor, x: Tensor, main: ConditionalDensityEstimator, **config
) -> EnergyProxy:
    proxy = EnergyProxy(prior, EnergyConfig(**{"fit": QUICK, **config}))
    proxy.set_proposal(main)
    rows = torch.arange(len(theta))
    cut = int(0.9 * len(theta))
    return proxy.fit(theta, x, rows[:cut], rows[cut:])


def held_out_nll(proxy: EnergyProxy, main: WideMain, theta: Tensor, x: Tensor) -> float:
    held_out = HeldOut(theta, x, torch.ones(len(x)))
    return held_out.mean(held_out.proxy_losses(proxy, main)[0])


def test_held_out_nll_approaches_the_exact_posteriors():
    prior, theta, x = gaussian_pairs(2_500)
    main = WideMain(x)
    proxy = fitted(prior, theta[:2_000], x[:2_000], main)
    value = held_out_nll(proxy, main, theta[2_000:], x[2_000:])
    exact = exact_nll(theta[2_000:], x[2_000:])
    prior_nll = float(-prior.log_prob(theta[2_000:]).mean())
    # Exact: 0.34 nats; prior: 2.84. Paired on the same data, so 0.1 is far above the noise.
    assert exact - 0.05 < value < exact + 0.1
    assert value < prior_nll - 2.0
    assert 0.2 < proxy.effective_sample_size <= 1.0
    assert proxy.result is not None
    assert math.isfinite(proxy.result.held_out)


@pytest.mark.slow
def test_atomic_contrasts_undo_a_proposal():
    """θ from a proposal twice as narrow and off centre: f is still the log-likelihood."""
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
    theta = 0.5 * torch.randn(2_000, 2) + 0.5
    x = theta + 0.6 * torch.randn_like(theta)
    proxy = EnergyProxy(prior, EnergyConfig(fit=QUICK))
    proxy.set_proposal(WideMain(x), atomic=True)
    rows = torch.arange(2_000)
    proxy.fit(theta, x, rows[:1_800], rows[1_800:])
    # Along the diagonal, second differences of f are those of the log-likelihood N(x; θ, 0.36):
    # −2 · 0.6²/0.36 = −2. The proposal's posterior would have −2 − 2 · 0.6² (1/0.25 − 1) = −4.2.
    at = torch.tensor([-0.1, 0.5, 1.1]).reshape(3, 1, 1).expand(3, 50, 2)
    low, middle, high = proxy.log_factor(at, 0.5 + 0.5 * torch.randn(50, 2))
    assert (low - 2 * middle + high).mean() == pytest.approx(-2.0, abs=0.7)


def test_no_mass_outside_a_box_prior():
    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    theta = prior.sample((1_000,))
    x = theta + NOISE * torch.randn_like(theta)
    main = WideMain(x)  # leaks over the box's edges
    proxy = fitted(prior, theta, x, main)
    outside = torch.tensor([[[1.01, 0.0]], [[1e6, 0.0]], [[0.0, -3.0]]])
    assert (proxy.log_potential(outside, x[:1]) == -math.inf).all()
    assert torch.isfinite(proxy.log_potential(theta[:5].unsqueeze(0), x[:5])).all()
    # The posterior of an x in the corner is cut by the box: narrower than without it.
    fresh = prior.sample((300,))
    x_fresh = fresh + NOISE * torch.randn_like(fresh)
    value = held_out_nll(proxy, main, fresh, x_fresh)
    assert value < 2 * (0.5 * math.log(2 * math.pi * math.e * NOISE**2)) + 0.1


def blobs(num: int) -> tuple[Distribution, Tensor, Tensor]:
    """8 × 8 images of a blob at θ with noise."""
    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    theta, grid = prior.sample((num,)), torch.linspace(-1.5, 1.5, 8)
    columns = torch.exp(-0.5 * ((grid - theta[:, :1]) / 0.5) ** 2)
    rows = torch.exp(-0.5 * ((grid - theta[:, 1:]) / 0.5) ** 2)
    return prior, theta, columns[:, :, None] * rows[:, None, :] + 0.2 * torch.randn(num, 8, 8)


@pytest.mark.parametrize("share", [pytest.param(True, marks=pytest.mark.slow), False])
def test_images_with_the_mains_embedding_or_one_of_its_own(share: bool):
    prior, theta, x = blobs(1_200)
    cnn = CNNEmbedding((8, 8), kernel_size=3, num_linear_units=20, output_dim=8)
    main = posterior_nn("mdn", embedding_net=cnn, z_score_x="structured")(theta, x)
    before = copy.deepcopy(main.state_dict())
    proxy = fitted(prior, theta[:1_000], x[:1_000], main, share_embedding=share)
    held_out = HeldOut(theta[1_000:], x[1_000:], torch.ones(200))
    value = held_out.mean(held_out.proxy_losses(proxy, main)[0])
    # The prior's NLL is 2 log 2 = 1.39. An untrained net's summaries say less than trained ones.
    assert value < (1.3 if share else 0.0)
    assert 0 < proxy.effective_sample_size <= 1
    assert all(torch.equal(a, b) for a, b in zip(before.values(), main.state_dict().values()))
    assert proxy.net is not None
    same = torch.equal(main.embedding_net(x[:5]), proxy.net.embedding(x[:5]))
    assert same == share


def test_several_networks_are_averaged_and_the_best_comes_first():
    prior, theta, x = gaussian_pairs(800)
    main = WideMain(x)
    one = fitted(prior, theta[:700], x[:700], main, num_nets=1)
    assert len(one.nets) == 1
    several = fitted(prior, theta[:700], x[:700], main, num_nets=3)
    at = theta[:20].unsqueeze(0)
    factors = torch.stack([net(at, net.summarise(x[:20])) for net in several.nets])  # type: ignore
    assert torch.allclose(several.log_factor(at, x[:20]), factors.mean(0))
    assert float((factors[0] - factors[1]).abs().max()) > 1e-3
    assert several.net is several.nets[0]


def test_contrasts_are_drawn_anew_every_few_epochs_and_for_every_network(monkeypatch):
    numbers, draw = [], EnergyProxy.draw

    def spy(self, theta, x, num, main):
        numbers.append(num)
        return draw(self, theta, x, num, main)

    monkeypatch.setattr(EnergyProxy, "draw", spy)
    config = FitConfig(max_epochs=6, patience=6, patience_steps=None)
    prior, theta, x = gaussian_pairs(50)
    settings = {"fit": config, "refresh_epochs": 2, "num_contrasts": 8, "num_nets": 3}
    fitted(prior, theta, x, WideMain(x), **settings)
    assert numbers[1:] == [16] * 9  # after those of the held-out pairs


def test_padded_trials_with_a_permutation_invariant_net():
    prior = MultivariateNormal(torch.zeros(1), torch.eye(1))
    theta = prior.sample((1_200,))
    x = theta[:, :, None] + torch.randn(1_200, 6, 1)
    x[torch.arange(6) >= torch.randint(1, 7, (1_200, 1))] = math.nan
    net = PermutationInvariantEmbedding(FCEmbedding(1, 10, num_hiddens=20), 10, output_dim=6)
    main = WideMain(x, net, dim=1, width=1.0)
    proxy = fitted(prior, theta[:1_000], x[:1_000], main, share_embedding=False)
    counts = (~x.isnan()).sum((1, 2))
    variance = 1 / (1 + counts)
    exact = Normal(x.nansum((1, 2)) * variance, variance.sqrt()).log_prob(theta[:, 0])[1_000:]
    value = held_out_nll(proxy, main, theta[1_000:], x[1_000:])
    assert value < float(-exact.mean()) + 0.15  # the prior is at +0.5
    shuffled = x[:20].clone()
    shuffled[:, [0, 1]] = shuffled[:, [1, 0]]
    pair = (theta[:20].unsqueeze(0),)
    full = counts[:20] >= 2
    torch.testing.assert_close(
        proxy.log_factor(*pair, shuffled)[0][full], proxy.log_factor(*pair, x[:20])[0][full]
    )


def test_x_is_embedded_once_per_call_however_many_theta():
    rows_seen: list[int] = []

    class Counting(nn.Flatten):
        def forward(self, input: Tensor) -> Tensor:
            rows_seen.append(len(input))
            return super().forward(input)

    x = torch.randn(5, 2, 1)
    main = WideMain(x, Counting())
    theta = torch.randn(7, 5, 2)
    expected = main.log_prob(theta, x)
    assert rows_seen == [35]
    rows_seen.clear()
    with embedded_once(main, x), embedded_once(main, x):
        assert torch.equal(main.log_prob(theta, x), expected)
        assert main.sample(torch.Size((3,)), x).shape == (3, 5, 2)
    assert rows_seen == [5, 5]
    with embedded_once(main, x):  # another x is embedded as it should be
        assert not torch.equal(main.log_prob(theta, x + 1), expected)
    assert torch.equal(main.log_prob(theta, x), expected)
    assert not main.embedding._forward_hooks
    assert not main.embedding._forward_pre_hooks


@pytest.mark.parametrize("model", ["maf", "zuko_nsf", "mdn"])
def test_embedding_once_agrees_for_sbis_estimators_with_gradients(model: str):
    theta, x = torch.randn(40, 2), torch.randn(40, 3)
    main = posterior_nn(model, embedding_net=FCEmbedding(3, 4))(theta, x)
    many = torch.randn(6, 40, 2)
    parameters = [p for p in main.embedding_net.parameters() if p.requires_grad]
    plain = main.log_prob(many, x)
    gradients = torch.autograd.grad(plain.sum(), parameters)
    with embedded_once(main, x):
        once = main.log_prob(many, x)
    torch.testing.assert_close(once, plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(once.sum(), parameters), gradients, atol=2e-3, rtol=1e-3
    )


def test_contrasts_follow_the_mixture_and_know_its_density():
    prior, theta, x = gaussian_pairs(50)
    main, proxy = WideMain(x), EnergyProxy(prior)
    contrasts = draw_contrasts(proxy, main, theta, x, 4_000)
    # E_m[p/m] = 1: the offsets are importance weights of the prior.
    torch.testing.assert_close(contrasts.offset.exp().mean(0), torch.ones(50), atol=0.1, rtol=0)
    assert contrasts.offset.max() <= math.log(4.0) + 1e-5  # a quarter is the prior: bounded
    picked = contrasts.pick(torch.tensor([3, 7]), 10)
    assert picked.theta.shape == (10, 2, 2)
    atoms = draw_atoms(theta, 30)
    assert not (atoms.theta == theta).all(-1).any()


def test_copies_and_pickles_agree_and_leave_the_main_behind():
    prior, theta, x = gaussian_pairs(200)
    main = WideMain(x)
    proxy = fitted(prior, theta, x, main, fit=FitConfig(max_epochs=2), classifier="resnet")
    value = proxy.log_potential(theta[:9].unsqueeze(0), x[:9])
    assert not any(module is main for module in proxy.modules())
    for other in (copy.deepcopy(proxy), pickle.loads(pickle.dumps(proxy))):
        assert torch.equal(other.log_potential(theta[:9].unsqueeze(0), x[:9]), value)
        assert other.effective_sample_size == proxy.effective_sample_size
        with pytest.raises(RuntimeError, match=r"call set_proposal\(main\)"):
            other.fit(theta, x, torch.arange(150), torch.arange(150, 200))
        other.set_proposal(main)


def test_summary_nets_are_copies_with_the_mains_scaling():
    theta, x = torch.randn(50, 2), 5 + 3 * torch.randn(50, 3)
    main = posterior_nn("maf")(theta, x)
    summary = summary_net(main)(x)
    torch.testing.assert_close(summary.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(summary.std(0), torch.ones(3), atol=1e-4, rtol=0)
    assert summary_net(main) is not main.embedding_net


def test_dead_summaries_do_not_throw_the_energy_off():
    """A unit that was silent in training speaks up on a new x."""

    class DeadUnit(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, torch.relu(x[:, :1] - 20)], dim=1)

    prior, theta, x = gaussian_pairs(300)
    main = WideMain(x, DeadUnit())
    proxy = fitted(prior, theta, x, main, fit=FitConfig(max_epochs=2))
    value = proxy.log_factor(theta[:4].unsqueeze(0), torch.tensor([[21.0, 0.0]]).expand(4, 2))
    assert (value.abs() < 1e3).all()


@pytest.mark.parametrize("num", [4, 6])
def test_a_handful_of_simulations(num: int):
    prior, theta, x = gaussian_pairs(num)
    proxy = fitted(prior, theta, x, WideMain(x), fit=FitConfig(max_epochs=3))
    assert torch.isfinite(proxy.log_potential(theta.unsqueeze(0), x)).all()


def test_errors_say_what_to_do():
    prior, theta, x = gaussian_pairs(20)
    rows = torch.arange(20)
    proxy = EnergyProxy(prior)
    with pytest.raises(RuntimeError, match=r"call set_proposal\(main\)"):
        proxy.fit(theta, x, rows[:15], rows[15:])
    with pytest.raises(RuntimeError, match="not fitted"):
        proxy.log_potential(theta.unsqueeze(0), x)
    with pytest.raises(TypeError, match="Linear has no sample and no log_prob"):
        proxy.set_proposal(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config must be of type EnergyConfig, got dict"):
        EnergyProxy(prior, {"classifier": "mlp"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"embedding_net must be .*pass a torch module"):
        EnergyProxy(prior, embedding_net=lambda x: x)  # type: ignore[arg-type]
    x[3] = math.nan
    proxy.set_proposal(WideMain(x))
    with pytest.raises(
        ValueError,
        match=r"1 of 20 simulations, 1 of which contain NaN.*PermutationInvariantEmbedding",
    ):
        proxy.fit(theta, x, rows[:15], rows[15:])
    with pytest.raises(TypeError, match=r"x must be of type Tensor.*pad x of varying length"):
        proxy.fit(theta, list(x), rows[:15], rows[15:])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("classifier", "linear", ValueError, r"classifier must be one of .*got 'linear'"),
        ("num_contrasts", 2, ValueError, "num_contrasts must be an int ≥ 4, got 2"),
        ("refresh_epochs", 1.5, TypeError, "refresh_epochs must be an int"),
        ("fit", {}, TypeError, "fit must be of type FitConfig, got dict"),
    ],
)
def test_configuration_is_validated(field, value, error, message):
    with pytest.raises(error, match=message):
        EnergyConfig(**{field: value})

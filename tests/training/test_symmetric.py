"""The symmetric stage with a Gaussian main and a known proxy: every term, weight and constraint.

p(θ) = N(0, 1), proxy x = θ + N(0, 0.5²), so q(θ|x) = N(0.8 x, 0.2) and its marginal N(0, 1.25).
The real simulations follow another law, x = −θ + N(0, 0.5²): what follows which is visible.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from sbi_jeffreys import JeffreysOptions
from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.networks.flat import flattened
from sbi_jeffreys.networks.muon import Muon
from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.training.loss import SymmetricLoss, weigh
from sbi_jeffreys.training.pool import Pool, resampled_pool
from sbi_jeffreys.training.stage import SymmetricStage

SCALE = 0.5
SLOPE, STD = 1 / (1 + SCALE**2), math.sqrt(SCALE**2 / (1 + SCALE**2))
OPTIONS = JeffreysOptions(
    steps_per_epoch=20,
    proxy_batch_size=500,
    reverse_batch_size=100,
    learning_rate_factor=60.0,
)


class GaussianMain(ConditionalDensityEstimator):
    """N(a x, e^{2s}), a and s learned."""

    def __init__(self, slope: float = 0.0, std: float = 1.0) -> None:
        super().__init__(nn.Identity(), torch.Size((1,)), torch.Size((1,)))
        self.slope = nn.Parameter(torch.tensor(slope))
        self.log_std = nn.Parameter(torch.tensor(math.log(std)))

    @property
    def embedding_net(self) -> None:
        return None

    def log_prob(self, input: Tensor, condition: Tensor, **kwargs) -> Tensor:
        return Normal(self.slope * condition, self.log_std.exp()).log_prob(input)[..., 0]

    def sample(self, sample_shape: torch.Size, condition: Tensor, **kwargs) -> Tensor:
        noise = torch.randn(*sample_shape, *condition.shape)
        return self.slope * condition + self.log_std.exp() * noise

    def loss(self, input: Tensor, condition: Tensor, **kwargs) -> Tensor:
        return -self.log_prob(input.unsqueeze(0), condition)[0]


class GaussianProxy(Proxy):
    """The exact posterior of x = θ + noise, up to a constant of its own."""

    def log_factor(self, theta: Tensor, x: Tensor) -> Tensor:
        return Normal(theta, SCALE).log_prob(x)[..., 0] + 3.0


def pool(num: int = 20_000) -> tuple[Tensor, Tensor]:
    theta = torch.randn(num, 1)
    return theta, theta + SCALE * torch.randn(num, 1)


def stage(
    main: GaussianMain | None = None, trust: float = 1.0, pairs: bool = True, **changes
) -> SymmetricStage:
    theta, x = pool()
    proxy = GaussianProxy(MultivariateNormal(torch.zeros(1), torch.eye(1)))
    options = replace(OPTIONS, **changes)
    main = GaussianMain() if main is None else main
    observations = Pool(theta, x, torch.ones(len(x)))
    if not pairs:
        observations = resampled_pool(proxy, main, theta[:500], x[:500])  # type: ignore[arg-type]
    loss = SymmetricLoss(main, proxy, observations, options, trust)
    return SymmetricStage(loss, options, 5e-4, 5.0, entropy=0.0, npe_nll=1.0, num_steps=400)


def test_steps_are_smaller_where_the_proxy_has_no_pairs():
    """At 30 times NPE's learning rate an embedding net trained through an energy diverged."""
    peaks = {
        (factor, pairs): stage(pairs=pairs, learning_rate_factor=factor).peak_learning_rate
        for factor in (None, 60.0)
        for pairs in (True, False)
    }
    expected = {(None, True): 30, (None, False): 20, (60.0, True): 60, (60.0, False): 60}
    assert peaks == {key: pytest.approx(5e-4 * value) for key, value in expected.items()}


def real() -> tuple[Tensor, Tensor, Tensor]:
    theta = torch.randn(200, 1)
    return theta, -theta + SCALE * torch.randn(200, 1), torch.ones(200)


def run(trained: SymmetricStage) -> GaussianMain:
    while not trained.finished:
        trained.run_epoch(real)
    assert isinstance(trained.main, GaussianMain)
    return trained.main


@pytest.mark.parametrize("trust", [1.0, 0.3])
@pytest.mark.parametrize("multiplier", [0.0, 2.0])
def test_the_weights_are_those_of_the_formula(trust: float, multiplier: float):
    """[λ (w_F F + t G) + t R] / (1 + λ) with w_F = 0.1 t + 1 − t; F and R come every 4th step."""
    lam = torch.tensor(multiplier)
    forward, generated, reverse = (torch.tensor(v) for v in (1.3, -0.7, 2.1))
    weight = 0.1 * trust + 1 - trust
    g = multiplier * trust * generated
    with_f = weigh({"generated": generated, "forward": forward}, lam, trust)
    torch.testing.assert_close(with_f, (g + 4 * multiplier * weight * forward) / (1 + multiplier))
    with_r = weigh({"generated": generated, "reverse": reverse}, lam, trust)
    torch.testing.assert_close(with_r, (g + 4 * trust * reverse) / (1 + multiplier))


def one_step(found: SymmetricStage) -> dict[str, torch.Tensor]:
    with flattened(found.main, found.vector) as weights:
        return found._step(weights, real)


def test_terms_take_turns_and_have_their_analytic_values():
    """G at the exact posterior is its entropy, F at the real law its cross-entropy, R is zero."""
    found = stage(GaussianMain(SLOPE, STD), proxy_batch_size=5_000)
    terms = one_step(found)
    assert set(terms) == {"generated", "reverse"}
    entropy = 0.5 * math.log(2 * math.pi * math.e * STD**2)
    assert float(terms["generated"]) == pytest.approx(entropy, abs=4 / math.sqrt(2 * 5_000))
    assert float(terms["reverse"]) == pytest.approx(0.0, abs=1e-5)
    kinds = [set(one_step(found)) - {"generated"} for _ in range(7)]
    assert kinds == [{"forward"}, set(), set(), {"reverse"}, {"forward"}, set(), set()]
    found = stage(GaussianMain(SLOPE, STD))
    found.step = 1
    # E (θ − a x)² with x = −θ + noise: (1 + a)² + a² 0.25.
    squared = (1 + SLOPE) ** 2 + SLOPE**2 * SCALE**2
    expected = 0.5 * math.log(2 * math.pi * STD**2) + 0.5 * squared / STD**2
    value = float(one_step(found)["forward"])
    # 200 pairs; the squares are (1.8 θ + …)² with a standard deviation of √2 times their mean.
    assert value == pytest.approx(expected, abs=4 * squared / STD**2 / math.sqrt(2 * 200))


def test_the_reverse_term_alone_finds_the_proxys_posterior():
    """λ = 0 leaves t R: neither F nor G has a weight, and the real law is not followed."""
    main = run(stage(adaptive=False, initial_multiplier=0.0))
    assert float(main.slope) == pytest.approx(SLOPE, abs=0.02)
    assert float(main.log_std.exp()) == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize("pairs", [True, False])
def test_the_proxys_pairs_alone_find_its_posterior(pairs: bool):
    """Without R and F, G does it: on drawn pairs, or on θ̃ resampled at observations."""
    found = stage(pairs=pairs, adaptive=False, initial_multiplier=1.0)
    every_term = found.loss

    def generated_alone(step, multiplier, next_real):
        _, terms = every_term(step, multiplier, next_real)
        return weigh({"generated": terms["generated"]}, multiplier, 1.0), terms

    found.loss = generated_alone
    main = run(found)
    assert float(main.slope) == pytest.approx(SLOPE, abs=0.04)
    assert float(main.log_std.exp()) == pytest.approx(STD, abs=0.04)


def test_without_trust_the_simulations_decide():
    """t → 0 takes the say from the proxy: the main follows the real law, whose slope is −0.8."""
    main = run(stage(trust=1e-6, adaptive=False, initial_multiplier=1.0))
    assert float(main.slope) == pytest.approx(-SLOPE, abs=0.05)
    full = run(stage(trust=1.0, adaptive=False, initial_multiplier=1.0))
    assert float(full.slope) > 0.5


def test_the_multiplier_follows_the_held_out_gap():
    """A violation raises λ towards α times it; a new best lowers Ĥ; frozen ones stay."""
    found = stage()
    assert float(found.multipliers.multipliers[0]) == pytest.approx(0.3)
    for _ in range(100):
        found.update_multipliers(0.25)
    gap = 0.25 - found.options.tolerance
    assert float(found.multipliers.multipliers[0]) == pytest.approx(
        found.options.slack_price * gap, rel=0.05
    )
    assert float(found.multipliers.slack[0]) == pytest.approx(gap, rel=0.05)
    found.update_multipliers(-0.5)
    assert found.entropy == -0.5
    frozen = stage(adaptive=False)
    frozen.update_multipliers(5.0)
    assert float(frozen.multipliers.multipliers[0]) == 1.0


def test_a_satisfied_constraint_hands_over_to_the_reverse_term():
    found = stage()
    for _ in range(50):
        found.update_multipliers(0.0)
    assert float(found.multipliers.multipliers[0]) == 0.0
    generated, reverse = torch.tensor(5.0), torch.tensor(1.0)
    lam = found.multipliers.multipliers[0]
    assert float(weigh({"generated": generated, "reverse": reverse}, lam, 1.0)) == 4.0
    assert float(weigh({"generated": generated}, lam, 1.0)) == 0.0


def test_a_non_finite_gradient_skips_the_step():
    found = stage()
    before = found.main.slope.detach().clone()  # type: ignore[union-attr]
    found.pool.x.fill_(math.nan)
    one_step(found)
    assert torch.equal(found.main.slope.detach(), before)  # type: ignore[union-attr]
    assert found.step == found.skipped == 1


def length_after(losses: list[float], epoch: int = 20, **changes) -> tuple[int, int]:
    """Steps and doublings of a stage of 400 steps whose R has these losses, epoch by epoch."""
    found, left = stage(**changes), iter(losses)
    while not found.finished:
        found.step = min(found.step + epoch, found.num_steps)
        found.latest["reverse"] = next(left)
        found.adapt_length()
    return found.num_steps, found.doublings


def test_the_stage_is_longer_where_main_and_proxy_are_apart():
    """Half the variance of log p − log q at half of the length: above 2, and then above 4."""
    assert length_after([3.0] * 100, max_doublings=2) == (800, 1)
    assert length_after([5.0] * 100, max_doublings=2) == (1_600, 2)
    assert length_after([50.0] * 100, max_doublings=2) == (1_600, 2)
    assert length_after([50.0] * 100) == (800, 1)
    assert length_after([5.0] * 100, max_doublings=3) == (1_600, 2)
    assert length_after([5.0] * 100, max_doublings=0) == (400, 0)
    assert length_after([50.0] * 7 + [1.0] * 100) == (400, 0)  # only the last epochs count
    assert length_after([1.0] * 7 + [5.0] * 5 + [0.1] * 100) == (600, 1)


def test_matrices_take_steps_of_muon():
    """The linear layer's weights move by a matrix of singular values near 0.2 √5 lr, not by lr."""
    found = stage(main=nn.Linear(5, 3))  # type: ignore[arg-type]
    assert isinstance(found.optimizer, Muon)
    assert found.optimizer.param_groups[0]["shapes"] == ((3, 5), (3,))
    assert found.vector is not None
    found.vector.grad = torch.randn_like(found.vector)
    before = found.vector.detach().clone()
    found.optimizer.step()
    step = (before - found.vector.detach())[:15].view(3, 5) / found.peak_learning_rate
    assert float(torch.linalg.svdvals(step).min()) > 0.6 * 0.2 * math.sqrt(5)
    assert float(torch.linalg.svdvals(step).max()) < 1.25 * 0.2 * math.sqrt(5)


def test_the_stage_is_shorter_where_main_and_proxy_agree():
    assert length_after([9.0] * 7 + [0.1] * 100) == (300, 0)
    assert length_after([9.0] * 7 + [0.1] * 100, num_steps=400) == (400, 0)  # as asked for
    assert length_after([math.nan] * 100) == (400, 0)


@pytest.mark.parametrize(
    ("epoch", "longer", "shorter"),
    [(220, (800, 1), 300), (240, (800, 1), 300), (260, (400, 0), 400), (1_000, (400, 0), 400)],
)
def test_a_stage_of_few_epochs_is_not_adapted_when_it_is_nearly_annealed(epoch, longer, shorter):
    """Near the end the learning rate is next to zero, and more steps would begin with a jump."""
    assert length_after([3.0] * 100, epoch) == longer
    assert length_after([0.1] * 100, epoch) == (shorter, 0)


def test_a_gaussian_main_has_a_shorter_stage_because_it_reaches_its_proxy():
    found = stage()
    while not found.finished:
        found.run_epoch(real)
        found.adapt_length()
    assert found.num_steps == 300

"""The estimate of a proxy's partition function against proxies whose normaliser is known."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.proxies import normaliser
from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.proxies.kernels import Kernels, WeightedDraws
from sbi_jeffreys.proxies.normaliser import Normaliser, adapted_draws
from sbi_jeffreys.proxies.partition import defensive_log_density

PRIOR_STD, NUM, PAIRS = 3.0, 128, 100


class Main(ConditionalDensityEstimator):
    """N(x, scale² I)."""

    def __init__(self, scale: float, dim: int) -> None:
        super().__init__(nn.Identity(), torch.Size((dim,)), torch.Size((dim,)))
        self.scale = scale

    @property
    def embedding_net(self) -> None:
        return None

    def log_prob(self, input: Tensor, condition: Tensor, **kwargs) -> Tensor:
        return Normal(condition, self.scale).log_prob(input).sum(-1)

    def sample(self, sample_shape: torch.Size, condition: Tensor, **kwargs) -> Tensor:
        return condition + self.scale * torch.randn(*sample_shape, *condition.shape)

    def loss(self, input: Tensor, condition: Tensor, **kwargs) -> Tensor:
        return -self.log_prob(input[None], condition)[0]


class Known(Proxy):
    """p(θ) Σ_j w_j N(θ; x + shift_j, scale²): its normaliser is a mixture's density."""

    def __init__(self, dim: int, scale: float, shifts=(0.0,), absurd: bool = False) -> None:
        super().__init__(MultivariateNormal(torch.zeros(dim), PRIOR_STD**2 * torch.eye(dim)))
        self.scale, self.shifts, self.absurd = scale, shifts, absurd

    def _centres(self, x: Tensor) -> list[Tensor]:
        centres = [x + shift for shift in self.shifts]
        if self.absurd:
            centres = [torch.where(is_absurd(x)[:, None], c + 3.0, c) for c in centres]
        return centres

    def log_factor(self, theta: Tensor, x: Tensor) -> Tensor:
        parts = [Normal(c, self.scale).log_prob(theta).sum(-1) for c in self._centres(x)]
        return torch.logsumexp(torch.stack(parts), 0) - math.log(len(parts))

    def log_z(self, x: Tensor) -> Tensor:
        spread = math.sqrt(PRIOR_STD**2 + self.scale**2)
        parts = [Normal(0.0, spread).log_prob(c).sum(-1) for c in self._centres(x)]
        return torch.logsumexp(torch.stack(parts), 0) - math.log(len(parts))


def is_absurd(x: Tensor) -> Tensor:
    """One x in ten, by its second output."""
    return x[:, 1] > 1.28


def pairs(dim: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(PAIRS, dim)
    return x + torch.randn(PAIRS, dim), x


def estimate_log_normaliser(proxy, main, theta, x, num, **kwargs) -> Normaliser:
    draws = adapted_draws(proxy, main, theta, x, num, **kwargs)
    return draws.log_normaliser(proxy.inverse_temperature)


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("scale", [0.1, 1 / 3, 1.0, 3.0])
@pytest.mark.parametrize("main_scale", [0.5, 1.0, 2.0])
def test_the_estimate_is_within_a_tenth_of_a_nat_or_says_that_it_is_not(dim, scale, main_scale):
    """Proxies that are a third to ten times as sharp as a main, itself too narrow or too wide."""
    (theta, x), proxy = pairs(dim), Known(dim, scale)
    found = estimate_log_normaliser(proxy, Main(main_scale, dim), theta, x, NUM)
    error = found.lower - proxy.log_z(x)
    certain = error[~found.uncertain]
    assert len(certain) > 0.5 * PAIRS
    # A quarter of 128 draws is effective: a standard error of at most .18 per pair.
    assert abs(float(certain.mean())) < 0.1
    assert float(certain.abs().max()) < 1.0


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_a_sharp_proxy_that_looks_elsewhere_is_found_out(shift):
    """One round of draws misses its peak, reads log Z nats too low, and flatters the proxy."""
    (theta, x), proxy = pairs(5), Known(5, 0.3, (shift,))
    truth = proxy.log_z(x)
    once = estimate_log_normaliser(proxy, Main(1.0, 5), theta, x, NUM, max_rounds=0)
    adapted = estimate_log_normaliser(proxy, Main(1.0, 5), theta, x, NUM)
    assert float((once.lower - truth).mean()) < -0.5
    assert abs(float((adapted.lower - truth)[~adapted.uncertain].mean())) < 0.1


def test_what_is_absurd_at_one_x_in_ten_is_seen_there_and_only_there():
    (theta, x), proxy = pairs(2), Known(2, 0.3, absurd=True)
    absurd = is_absurd(x)
    found = estimate_log_normaliser(proxy, Main(1.0, 2), theta, x, NUM)
    losses = found.pessimistic - proxy.log_potential(theta.unsqueeze(0), x)[0]
    exact = proxy.log_z(x) - proxy.log_potential(theta.unsqueeze(0), x)[0]
    torch.testing.assert_close(losses[absurd], exact[absurd], atol=0.5, rtol=0)
    assert float(losses[absurd].mean()) > 20 + float(losses[~absurd].mean())


def test_adaptation_stops_where_it_makes_no_progress(monkeypatch):
    """A factor so rough that no kernel follows it: not all of the twelve rounds are run."""

    class Rough(Known):
        def log_factor(self, theta: Tensor, x: Tensor) -> Tensor:
            return 10 * torch.sin(1e4 * theta).sum(-1)

    rounds = []
    original = normaliser._next_round

    def counted(proxy, main, theta, x, num, kernels):
        rounds.append(len(x))
        return original(proxy, main, theta, x, num, kernels)

    monkeypatch.setattr(normaliser, "_next_round", counted)
    torch.manual_seed(0)
    estimate_log_normaliser(Rough(5, 1.0), Main(1.0, 5), *pairs(5), NUM, patience=4)
    assert sum(rounds) < 9 * PAIRS  # twelve without the rule; some records come by chance


def test_two_modes_are_both_counted():
    (theta, x), proxy = pairs(2), Known(2, 0.1, (-1.0, 1.0))
    found = estimate_log_normaliser(proxy, Main(1.0, 2), theta, x, NUM)
    error = found.lower - proxy.log_z(x)
    assert abs(float(error.mean())) < 0.1


def test_the_pessimistic_bound_limits_what_a_proxy_can_claim():
    """However wrong Ẑ is, no better than the proposal by more than log(K + 1) nats."""
    (theta, x), proxy, main = pairs(3), Known(3, 0.02), Main(0.3, 3)
    x = theta + 0.02 * torch.randn_like(theta)  # an oracle's peak, which no draw of the prior hits
    log_m, _ = defensive_log_density(proxy, main, theta.unsqueeze(0), x)
    found = estimate_log_normaliser(proxy, main, theta, x, NUM, max_rounds=0)
    log_q = proxy.log_potential(theta.unsqueeze(0), x)[0]
    bound = -log_m[0] - math.log(NUM + 1)
    assert bool((found.pessimistic - log_q >= bound - 1e-4).all())
    assert bool((found.lower - log_q < bound - 1e-4).any())  # the lower bound alone claims more
    assert float(found.uncertain.float().mean()) > 0.9


def test_without_annealing_the_peak_is_not_reached(monkeypatch):
    """What the annealed weights are worth: at τ = 1 throughout, one draw decides each proposal."""
    (theta, x), proxy = pairs(5), Known(5, 0.1)
    truth = proxy.log_z(x)
    annealed = estimate_log_normaliser(proxy, Main(1.0, 5), theta, x, NUM, max_rounds=4)
    monkeypatch.setattr(normaliser, "_annealed", lambda log_weights: log_weights)
    plain = estimate_log_normaliser(proxy, Main(1.0, 5), theta, x, NUM, max_rounds=4)
    errors = [float((e.lower - truth).abs().mean()) for e in (annealed, plain)]
    assert errors[0] < 0.5 * errors[1]


class Wild(Main):
    """A main that draws one θ per observation far away, where its density is not known."""

    far: float = 0.0

    def sample(self, sample_shape: torch.Size, condition: Tensor, **kwargs) -> Tensor:
        drawn = super().sample(sample_shape, condition)
        drawn[0] = self.far
        return drawn


@pytest.mark.parametrize("far", [1e6, 1e10, 1e20, math.inf, math.nan])
def test_one_draw_far_away_changes_nothing(far):
    proxy, main = Known(2, 0.05), Wild(1.0, 2)
    main.far = far
    torch.manual_seed(0)
    x = torch.randn(20, 2)
    draws = adapted_draws(proxy, main, x.clone(), x, 256)
    found = draws.log_normaliser(1.0)
    assert torch.allclose(found.lower, proxy.log_z(x), atol=0.5)
    assert bool((found.effective > 0.2 * 256).all())


def test_an_observation_from_far_away_is_improbable_and_no_error():
    proxy, main = Known(2, 0.05), Wild(1.0, 2)
    x = torch.tensor([[1e15, 0.0], [3e38, -3e38], [0.1, 0.2]])
    torch.manual_seed(0)
    found = adapted_draws(proxy, main, x.clone(), x, 256).log_normaliser(1.0)
    assert bool((found.lower[:2] < -1e10).all())
    assert abs(float(found.lower[2] - proxy.log_z(x)[2])) < 0.5


def test_the_proposals_density_is_exact_far_from_zero():
    """θ may be a hundred thousand posterior widths away from 0, as masses in kilograms are."""
    torch.manual_seed(0)
    theta = 1000.0 + 0.01 * torch.randn(256, 1, 2)
    own = Kernels.about(WeightedDraws.of(theta, torch.zeros(256, 1)))
    parts = (own.centres, own.factor, own.scales, own.unit)
    exact = Kernels(*(part.double() for part in parts))
    torch.testing.assert_close(
        own.log_prob(theta).double(), exact.log_prob(theta.double()), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("make", [Kernels.moments, Kernels.about])
@pytest.mark.parametrize("unit", [1e-25, 1e25])
def test_units_of_the_parameters_do_not_matter(make, unit):
    theta = torch.randn(64, 3, 2)
    weights, units = torch.randn(64, 3), torch.tensor([1.0, unit])
    torch.manual_seed(1)
    plain = make(WeightedDraws.of(theta, weights))
    torch.manual_seed(1)
    scaled = make(WeightedDraws.of(theta * units, weights))
    shifted = plain.log_prob(theta) - math.log(unit)
    torch.testing.assert_close(scaled.log_prob(theta * units), shifted, atol=1e-3, rtol=0)
    torch.manual_seed(2)
    drawn = plain.sample(100)
    torch.manual_seed(2)
    torch.testing.assert_close(scaled.sample(100) / units, drawn, atol=1e-3, rtol=1e-3)

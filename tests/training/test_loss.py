"""The loss of one step: when F has no weight, and when the pool is drawn anew."""

import torch

from sbi_jeffreys import JeffreysOptions
from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.training.loss import SymmetricLoss, weigh
from sbi_jeffreys.training.pool import Pool, tempering_weights

OPTIONS = JeffreysOptions(proxy_batch_size=10, reverse_batch_size=5, reverse_samples=2)


class UnitMain(torch.nn.Module):
    """N(shift, 1) in one dimension, whatever x is."""

    embedding_net = None

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.tensor(shift))

    def log_prob(self, theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Normal(self.shift, 1.0).log_prob(theta).sum(-1)

    def sample(self, shape: torch.Size, x: torch.Tensor) -> torch.Tensor:
        return self.shift.detach() + torch.randn(*shape, len(x), 1)


class UnitProxy(Proxy):
    """N(0, 1), whose draws of x count how often they were asked for."""

    can_sample = True

    def __init__(self, plausible: float = 1.0) -> None:
        super().__init__(torch.distributions.MultivariateNormal(torch.zeros(1), torch.eye(1)))
        self.asked, self.plausible = 0, plausible

    def log_factor(self, theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(theta.shape[:2])

    def sample_joint(self, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked += 1
        num = int(self.plausible * num_samples)
        return torch.randn(num, 1), torch.full((num, 1), float(self.asked))


def loss_of(renewable: bool = False, size: int = 50) -> SymmetricLoss:
    pool = Pool(torch.randn(size, 1), torch.zeros(size, 1), torch.ones(size), renewable)
    return SymmetricLoss(UnitMain(0.5), UnitProxy(), pool, OPTIONS, trust=1.0)  # type: ignore


def real() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.full((4, 1), 2.0), torch.zeros(4, 1), torch.ones(4)


def test_a_satisfied_forward_term_has_no_weight():
    terms = {"generated": torch.tensor(3.0), "forward": torch.tensor(7.0)}
    multiplier = torch.tensor(2.0)
    assert float(weigh(terms, multiplier, 1.0)) > float(weigh(terms, multiplier, 1.0, True))
    assert float(weigh(terms, multiplier, 1.0, True)) == 2.0  # λ G / (1 + λ)


def test_f_has_weight_until_its_average_on_training_pairs_is_below_the_best_held_out_value():
    """F is ½ · 1.5² + ½ log 2π = 2.04 here; its gradient is what differs."""

    def gradient_of_f(entropy: float) -> float:
        torch.manual_seed(0)
        loss = loss_of()
        loss.entropy = entropy
        loss(1, torch.tensor(1.0), real)[0].backward()
        with_f = float(loss.main.shift.grad)  # type: ignore[union-attr]
        torch.manual_seed(0)
        loss = loss_of()
        loss(2, torch.tensor(1.0), real)[0].backward()  # neither F nor R: G alone
        return with_f - float(loss.main.shift.grad)  # type: ignore[union-attr]

    assert gradient_of_f(entropy=1.9) < -0.1
    assert abs(gradient_of_f(entropy=2.2)) < 1e-6


def test_a_renewable_pool_is_drawn_anew_once_its_pairs_were_seen_twice():
    loss = loss_of(renewable=True)
    for step in range(25):
        loss(step, torch.tensor(1.0), real)
        seen_twice = step // 10  # 50 pairs, ten a step
        assert float(loss.pool.x[0]) == seen_twice
    other = loss_of()
    for step in range(25):
        other(step, torch.tensor(1.0), real)
    assert float(other.pool.x[0]) == 0


def test_a_pool_whose_draws_are_expensive_is_drawn_anew_later():
    loss = loss_of(renewable=True)
    loss.pool.uses = 4
    for step in range(25):
        loss(step, torch.tensor(1.0), real)
        assert float(loss.pool.x[0]) == step // 20


def test_a_renewed_pool_is_weighed_by_the_proxys_temperature():
    loss = loss_of(renewable=True)
    loss.proxy.inverse_temperature = torch.tensor(0.5)
    loss.proxy.log_factor = lambda theta, x: theta[..., 0]  # type: ignore[method-assign]
    for step in range(12):
        loss(step, torch.tensor(1.0), real)
    expected = tempering_weights(loss.proxy, loss.pool.theta, loss.pool.x)
    assert torch.equal(loss.pool.weights, expected)
    assert float(expected.std()) > 0.1


def test_a_pool_of_which_some_draws_are_not_plausible_does_not_shrink():
    """95 % of the 50 draws asked for are kept, however often they are drawn anew, and as often."""
    pool = Pool(torch.randn(47, 1), torch.zeros(47, 1), torch.ones(47), renewable=True, asked=50)
    proxy = UnitProxy(plausible=0.95)
    loss = SymmetricLoss(UnitMain(0.5), proxy, pool, OPTIONS, trust=1.0)  # type: ignore
    for step in range(200):
        loss(step, torch.tensor(1.0), real)
        assert len(pool.x) == 47
    assert proxy.asked == 19


def test_a_pool_pickled_before_its_size_was_remembered_does_not_shrink_further():
    pool = Pool(torch.randn(50, 1), torch.zeros(50, 1), torch.ones(50), renewable=True)
    loss = SymmetricLoss(UnitMain(0.5), UnitProxy(0.95), pool, OPTIONS, trust=1.0)  # type: ignore
    for step in range(200):
        loss(step, torch.tensor(1.0), real)
    assert len(pool.x) == 47

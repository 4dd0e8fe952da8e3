"""Metropolis steps that spread copies over a target, against targets whose moments are known."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Gamma, MultivariateNormal, Normal

from sbi_jeffreys.posteriors import moves
from sbi_jeffreys.posteriors.candidates import Candidates
from sbi_jeffreys.posteriors.moves import distinct_draws, moved

COVARIANCE = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
NORMAL = MultivariateNormal(torch.tensor([1.0, -2.0]), COVARIANCE)
SKEWED = Gamma(2.0, 4.0, validate_args=False)  # mean .5, standard deviation .354


def log_target(theta: Tensor) -> Tensor:
    """Two correlated parameters, and an independent one that is positive and skewed."""
    third = theta[:, 2]
    inside = torch.where(third > 0, SKEWED.log_prob(third.clamp_min(1e-9)), -torch.inf)
    return NORMAL.log_prob(theta[:, :2]) + inside


def draws_of_target(num: int) -> Tensor:
    return torch.cat([NORMAL.sample((num,)), SKEWED.sample((num, 1))], dim=1)


def candidates_of(num: int) -> Candidates:
    """2,000 candidates, of which the first `num` have all the weight."""
    theta = draws_of_target(2_000)
    log_weights = torch.where(torch.arange(2_000) < num, 0.0, -torch.inf)
    return Candidates(theta.unsqueeze(1), log_weights.unsqueeze(1))


def for_candidates(theta: Tensor) -> Tensor:
    return log_target(theta[:, 0]).unsqueeze(1)


def test_copies_of_twenty_draws_become_draws_of_a_skewed_correlated_target():
    torch.manual_seed(0)
    draws = moved(draws_of_target(20).repeat_interleave(100, dim=0), log_target)
    assert len(draws.unique(dim=0)) > 1_990
    assert bool((draws[:, 2] > 0).all())
    # Standard errors are those of some 500 independent draws; twenty draws have five times these.
    assert draws[:, :2].mean(dim=0).tolist() == pytest.approx([1.0, -2.0], abs=0.15)
    assert torch.allclose(torch.cov(draws[:, :2].T), COVARIANCE, atol=0.2)
    third = draws[:, 2]
    assert float(third.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(third.std()) == pytest.approx(math.sqrt(2) / 4, rel=0.15)
    assert float((third < 0.25).float().mean()) == pytest.approx(0.264, abs=0.07)


def test_both_of_two_modes_keep_their_weights():
    """Modes at 0 and 20, of widths 1 and .5, with .3 and .7 of the mass."""
    torch.manual_seed(0)
    narrow, wide = Normal(20.0, 0.5), Normal(0.0, 1.0)

    def two_modes(theta: Tensor) -> Tensor:
        parts = wide.log_prob(theta) + math.log(0.3), narrow.log_prob(theta) + math.log(0.7)
        return torch.logaddexp(*parts).squeeze(1)

    few = torch.cat([wide.sample((6, 1)), narrow.sample((14, 1))])
    draws = moved(few.repeat_interleave(100, dim=0), two_modes)
    high = draws > 10
    assert float(high.float().mean()) == pytest.approx(0.7, abs=0.08)
    assert float(draws[high].std()) == pytest.approx(0.5, rel=0.15)
    assert float(draws[~high].std()) == pytest.approx(1.0, rel=0.15)


def test_few_draws_are_moved_among_many():
    """Two draws have no others whose differences they could move by."""
    torch.manual_seed(0)
    found = candidates_of(5)
    pairs = [distinct_draws(found, 2, for_candidates, 1_000) for _ in range(150)]
    draws = torch.cat(pairs)
    assert draws.shape == (300, 3)
    assert len(draws.unique(dim=0)) > 290
    assert draws[:, :2].std(dim=0).tolist() == pytest.approx([1.0, 1.0], rel=0.2)


def test_draws_with_few_copies_stay_candidates():
    torch.manual_seed(0)
    found = candidates_of(2_000)
    draws = distinct_draws(found, 100, for_candidates, 1_000)
    known = {tuple(row) for row in found.theta[:, 0].tolist()}
    assert all(tuple(row) in known for row in draws.tolist())


def test_calls_and_steps_are_bounded(monkeypatch):
    """Batches no larger than asked for, and fewer steps where there are many draws."""
    torch.manual_seed(0)
    sizes: list[int] = []

    def counted(theta: Tensor) -> Tensor:
        sizes.append(len(theta))
        return for_candidates(theta)

    distinct_draws(candidates_of(5), 1_000, counted, batch=300)
    assert max(sizes) == 300
    whole = sum(sizes)
    monkeypatch.setattr(moves, "_MOST_EVALUATIONS", 3_000)
    sizes.clear()
    distinct_draws(candidates_of(5), 1_000, counted, batch=300)
    assert sum(sizes) == 6_000 < whole  # the densities at the beginning, and five steps

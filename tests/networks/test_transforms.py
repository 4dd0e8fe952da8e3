"""Transforms are bijections with the right Jacobian, and pick what they should."""

import math

import pytest
import torch
from sbi.utils import BoxUniform, process_prior
from torch.distributions import Dirichlet, Independent, LogNormal, MultivariateNormal, Uniform

from sbi_jeffreys.networks.prior_space import PriorTransform, inside_support
from sbi_jeffreys.networks.standardised import StandardisedInput
from sbi_jeffreys.networks.transforms import MarginalTransform, scale_of

N = 500


def example() -> torch.Tensor:
    normal, positive = torch.randn(N), torch.randn(N).mul(1.5).exp()
    counts, constant = torch.poisson(torch.full((N,), 3.0)), torch.full((N,), 7.0)
    heavy = torch.distributions.StudentT(1.5).sample((N,))
    return torch.stack([normal, positive, counts, constant, heavy], dim=1)


def test_kinds_follow_the_data():
    transform = MarginalTransform.fit(example())
    assert transform.kinds[:2] == ["identity", "log"]
    assert transform.kinds[3] == "asinh"
    assert transform.keep.tolist() == [0, 1, 2, 4]  # the constant is dropped
    assert transform.integer.tolist() == [False, False, True, False]
    assert not transform.is_identity
    assert MarginalTransform.fit(torch.randn(N, 2)).is_identity


def test_inverse_restores_x_exactly_counts_and_constants_included():
    x = example()
    transform = MarginalTransform.fit(x)
    back = transform.inverse(transform(x))
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
    assert torch.equal(back[:, 2], x[:, 2])
    assert torch.equal(back[:, 3], x[:, 3])


def test_dequantised_counts_stay_in_their_cell_and_have_no_atoms():
    x = example()
    transform = MarginalTransform.fit(x)
    noisy = transform.dequantise(x)
    assert torch.equal(transform.inverse(noisy)[:, 2], x[:, 2])
    assert len(noisy[:, 2].unique()) > len(x[:, 2].unique())
    assert torch.equal(noisy[:, 0], x[:, 0])


def test_what_float32_cannot_resolve_is_no_count():
    """From 8 million on, all numbers of float32 are integers: watts are not counted."""
    torch.manual_seed(0)
    transform = MarginalTransform.fit(1e9 + 1e8 * torch.randn(N, 2))
    assert not bool(transform.integer.any())
    assert bool(MarginalTransform.fit(torch.randint(0, 10**6, (N, 1)).float()).integer.all())


@pytest.mark.parametrize("unit", [1e-18, 1e-9, 1.0, 1e9, 1e18])
def test_the_unit_of_x_does_not_decide(unit):
    torch.manual_seed(0)
    x = torch.randn(N, 2) @ torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    transform = MarginalTransform.fit(unit * x)
    assert transform.is_identity
    seen = StandardisedInput(transform, unit * x)(unit * x)
    torch.testing.assert_close(seen.std(dim=0), torch.ones(2), rtol=1e-3, atol=0)
    constant = torch.full((N, 1), unit)
    assert float(scale_of(torch.zeros(N, 1))) == 1.0
    assert 0 < float(scale_of(constant)) < 1e-6 * unit


def test_values_below_those_seen_stay_finite():
    transform = MarginalTransform.fit(torch.randn(N, 1).mul(1.5).exp())
    assert transform.kinds == ["log"]
    assert bool(torch.isfinite(transform(torch.tensor([[0.0], [-1.0]]))).all())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(5, 2, 2), r"shape \(N, dim_x\)"),
        (torch.full((5, 1), torch.nan), "NaN or inf"),
        (torch.ones(5, 2), "constant over all 5"),
    ],
)
def test_bad_x_is_named(x, message):
    with pytest.raises(ValueError, match=message):
        MarginalTransform.fit(x)


@pytest.mark.parametrize(
    "prior",
    [
        BoxUniform(torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 5.0])),
        Independent(LogNormal(torch.zeros(2), torch.ones(2)), 1),
    ],
    ids=["box", "log-normal"],
)
def test_prior_transform_preserves_probability(prior):
    transform = PriorTransform.fit(prior)
    assert transform is not None
    theta = prior.sample((N,)).double()
    u, log_det, inside = transform(theta)
    assert bool(inside.all())
    torch.testing.assert_close(transform.inverse(u), theta, rtol=1e-6, atol=1e-6)
    jacobian = torch.autograd.functional.jacobian(lambda t: transform(t)[0], theta[0])
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian)[1])


def test_outside_the_support_is_flagged_and_finite():
    transform = PriorTransform.fit(BoxUniform(torch.zeros(2), torch.ones(2)))
    u, log_det, inside = transform(torch.tensor([[0.5, 0.5], [1.5, 0.5]]))
    assert inside.tolist() == [True, False]
    assert bool(torch.isfinite(u).all())
    assert bool(torch.isfinite(log_det).all())


def test_unbounded_priors_need_no_transform():
    assert PriorTransform.fit(MultivariateNormal(torch.zeros(2), torch.eye(2))) is None


def test_a_joint_prior_is_asked_part_by_part():
    parts = [Uniform(torch.zeros(1), torch.ones(1)), Dirichlet(torch.ones(2))]
    prior = process_prior(parts)[0]
    theta = torch.tensor([[0.5, 0.3, 0.7], [1.5, 0.3, 0.7], [0.5, 1.3, -0.3]])
    assert inside_support(prior, theta).tolist() == [True, False, False]
    assert bool(inside_support(prior, prior.sample((100,))).all())


def test_a_box_is_mapped_so_that_a_flat_density_is_gaussian():
    prior = BoxUniform(torch.tensor([-1.0, 5.0]), torch.tensor([1.0, 9.0]))
    transform = PriorTransform.fit(prior)
    assert transform is not None
    theta = torch.linspace(0.001, 0.999, 201).unsqueeze(1) * torch.tensor([2.0, 4.0])
    theta = theta + torch.tensor([-1.0, 5.0])
    u, log_det, _ = transform(theta)
    flat = torch.distributions.Normal(0.0, 1.0).log_prob(u).sum(dim=1) + log_det
    torch.testing.assert_close(flat, prior.log_prob(theta), atol=2e-3, rtol=0)


def test_half_lines_keep_the_logarithm():
    parts = [LogNormal(torch.zeros(1), torch.ones(1)), Uniform(torch.zeros(1), torch.ones(1))]
    transform = PriorTransform.fit(process_prior(parts)[0])
    assert transform is not None
    assert transform.is_interval.tolist() == [False, True]
    u, _, _ = transform(torch.tensor([[math.e, 0.5]]))
    torch.testing.assert_close(u, torch.tensor([[1.0, 0.0]]))


def test_a_loaded_state_brings_its_kinds():
    torch.manual_seed(0)
    skewed = torch.randn(300, 2).exp()
    source, target = MarginalTransform.fit(skewed), MarginalTransform.fit(torch.randn(300, 2))
    assert source.kinds != target.kinds
    target.load_state_dict(source.state_dict())
    assert target.kinds == source.kinds
    assert torch.equal(target(skewed), source(skewed))

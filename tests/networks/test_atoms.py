"""Values that occur exactly, again and again, have cells of their own in T(x)."""

import math

import pytest
import torch
from sbi.utils import BoxUniform
from torch import Tensor

from sbi_jeffreys import MainBuilder
from sbi_jeffreys.networks.atoms import find_atoms
from sbi_jeffreys.networks.transforms import MarginalTransform

N = 2_000


def sometimes(value: float, other: Tensor, share: float = 0.3) -> Tensor:
    return torch.where(torch.rand(len(other)) < share, torch.tensor(value), other)


def example() -> Tensor:
    """Zeros below a log-normal, two limits, an atom in the middle, codes far from the values."""
    torch.manual_seed(0)
    normal, positive = torch.randn(N), torch.randn(N).exp()
    columns = [
        sometimes(0.0, positive),
        normal.clamp(-0.5, 1.0),
        sometimes(0.25, torch.randn(N)),
        sometimes(-999.0, normal),
        sometimes(999.0, positive),
    ]
    return torch.stack(columns, dim=1)


def test_atoms_are_found_and_the_kind_is_that_of_the_other_values():
    transform = MarginalTransform.fit(example())
    none = math.inf
    expected = torch.tensor([[0.0, -0.5, 0.25, -999.0, 999.0], [none, 1.0, none, none, none]])
    assert torch.equal(transform.atoms.values, expected)
    assert transform.kinds == ["log", "identity", "identity", "identity", "log"]
    assert not transform.is_identity
    assert bool(transform.has_cells.all())


def test_values_from_a_grid_rare_ones_and_counts_are_no_atoms():
    torch.manual_seed(0)
    rounded = (4 * torch.randn(N)).round() / 4
    rain = sometimes(0.0, (10 * torch.randn(N).exp()).ceil() / 20)
    rare = sometimes(0.0, torch.randn(N), share=0.01)
    binary = sometimes(0.5, torch.zeros(N))
    counts = torch.poisson(torch.full((N,), 0.5))
    large = sometimes(0.0, torch.randint(10**6, (N,)).float())  # have a cell each already
    x = torch.stack([rounded, rain, rare, binary, counts, large], dim=1)
    assert not bool(MarginalTransform.fit(x).atoms.of.any())
    nine_of_fifty = torch.cat([torch.zeros(9), torch.randn(41)]).unsqueeze(1)
    assert not bool(torch.isfinite(find_atoms(nine_of_fifty)).any())
    nine_others = torch.cat([torch.zeros(41), torch.randn(9)]).unsqueeze(1)
    assert not bool(torch.isfinite(find_atoms(nine_others)).any())


@pytest.mark.parametrize("choose", [True, False])
def test_the_inverse_restores_atoms_exactly_and_order_is_kept(choose):
    x = example()
    transform = MarginalTransform.fit(x, choose=choose)
    at = transform.in_cell(x)
    for y in (transform(x), transform.dequantise(x)):
        back = transform.inverse(y)
        assert torch.equal(back[at], x[at])
        torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
        for own, values in zip(y.T, x.T):
            order = values.argsort()
            strictly = values[order].diff() > 1e-6
            assert bool((own[order].diff()[strictly] > 0).all())


def test_an_atom_is_spread_evenly_over_a_cell_and_what_is_near_the_cell_is_the_atom():
    x = example()
    transform = MarginalTransform.fit(x)
    (low, high), values = transform.cell(x), transform.dequantise(x)
    width, middle = transform.atoms.width, transform(x)
    for d in range(x.shape[1]):
        at = transform.in_cell(x)[:, d] & (x[:, d] == transform.atoms.values[0, d])
        spread = values[at, d]
        assert float(spread.std()) == pytest.approx(float(width[d]) / math.sqrt(12), rel=0.1)
        assert bool(((spread > low[at, d]) & (spread < high[at, d])).all())
        both = torch.stack([middle[at][0]] * 2)
        both[:, d] += torch.tensor([-0.9, 0.9]) * width[d]  # in the gaps
        assert bool((transform.inverse(both)[:, d] == x[at, d][0]).all())


def test_the_density_at_an_atom_is_that_of_its_cell():
    """T(x) uniform on 0 to 20: the probability of a cell is its width in 20."""
    x = example()[:, :1]
    transform = MarginalTransform.fit(x)
    slope = transform.log_det(torch.zeros(1, 1))
    assert float(slope.exp()) == pytest.approx(float(transform.atoms.width[0]))
    _, noisy = transform.dequantised(torch.zeros(5, 1))
    torch.testing.assert_close(noisy, slope.expand(5))
    positive = x[x > 0][:1, None].double().requires_grad_()
    own = transform.double()
    (gradient,) = torch.autograd.grad(own(positive).sum(), positive)
    torch.testing.assert_close(gradient.log()[:, 0], own.log_det(positive).detach())


def test_beyond_a_limit_is_the_limit_and_beyond_other_atoms_is_not():
    transform = MarginalTransform.fit(example())
    beyond = torch.tensor([[-0.1, -3.0, 0.2, -2_000.0, 2_000.0]])
    assert transform.in_cell(beyond).tolist() == [[True, True, False, True, True]]
    back = transform.inverse(transform(beyond))
    torch.testing.assert_close(back, torch.tensor([[0.0, -0.5, 0.2, -999.0, 999.0]]))
    far = transform.inverse(torch.tensor([[-50.0, 50.0, 50.0, -50.0, 50.0]]))
    assert far[0, [0, 1, 3, 4]].tolist() == [0.0, 1.0, -999.0, 999.0]


def test_parameters_keep_their_scale_without_cells():
    x = example()
    assert not bool(MarginalTransform.fit(x, atoms=False).atoms.of.any())


def test_the_main_takes_x_with_atoms():
    torch.manual_seed(0)
    x, prior = example()[:200], BoxUniform(-torch.ones(2), torch.ones(2))
    theta = prior.sample((200,))
    main = MainBuilder("nsf").with_prior(prior)(theta, x)
    zero = x.clone()
    zero[:, 0] = 0.0
    tiny = zero.clone()
    tiny[:, 0] = 0.3
    assert main.embedding_net is not None
    summary = main.embedding_net(zero)
    torch.testing.assert_close(main.embedding_net(x).mean(dim=0), torch.zeros(5), atol=1e-4, rtol=0)
    assert bool((main.embedding_net(tiny)[:, 0] - summary[:, 0] > 0.5).all())  # told apart
    loss = main.loss(theta, x).mean()
    loss.backward()
    assert math.isfinite(float(loss.detach()))

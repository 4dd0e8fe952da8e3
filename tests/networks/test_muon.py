"""Muon on a vector of parameters is torch's Muon for matrices, and Adam for the rest."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from sbi_jeffreys.networks.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(3, 20, 50), (2, 50, 20), (1, 7, 7)])
def test_singular_vectors_are_kept_and_singular_values_are_near_one(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape).double()
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ orthogonalised(matrices) @ vh.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.25
    torch.testing.assert_close(inner, torch.diag_embed(values), atol=1e-10, rtol=0)


def test_the_scale_of_a_matrix_does_not_matter():
    torch.manual_seed(0)
    matrices = torch.randn(2, 5, 8)
    scaled = matrices * torch.tensor([1e-12, 1e6]).view(2, 1, 1)
    torch.testing.assert_close(orthogonalised(scaled), orthogonalised(matrices))


def test_a_gradient_of_zero_makes_no_step():
    assert orthogonalised(torch.zeros(2, 3, 4)).abs().max() == 0


def _parameters():
    torch.manual_seed(0)
    shapes = [(5, 4), (5,), (4, 7), (1, 3), (5, 4), (2, 2, 2)]
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_steps_are_those_of_torch_s_muon_and_adam():
    apart = _parameters()
    vector = nn.Parameter(torch.cat([p.detach().flatten() for p in apart]))
    ours = Muon(vector, [p.shape for p in apart], lr=0.01, fused=False)
    matrices = [apart[0], apart[2], apart[4]]
    how = {"momentum": 0.9, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    theirs = [
        torch.optim.Muon(matrices, lr=0.01, **how),
        torch.optim.Adam([apart[1], apart[3], apart[5]], lr=0.01),
    ]
    for _ in range(5):
        for parameter in apart:
            parameter.grad = torch.randn_like(parameter)
        vector.grad = torch.cat([p.grad.flatten() for p in apart if p.grad is not None])
        for optimizer in (ours, *theirs):
            optimizer.step()
    found = vector.detach().split([p.numel() for p in apart])
    for k, parameter in enumerate(apart):
        # torch's has sixteen bits: 0.4 % of five steps of at most 0.01.
        tolerance = 5e-4 if k in (0, 2, 4) else 1e-7
        torch.testing.assert_close(
            found[k].view_as(parameter), parameter.detach(), atol=tolerance, rtol=0
        )


def test_a_matrix_whose_iterations_would_cost_more_than_its_layer_is_left_to_adam():
    torch.manual_seed(0)
    shapes = [torch.Size((257, 300)), torch.Size((256, 300))]
    vector = nn.Parameter(torch.zeros(sum(shape.numel() for shape in shapes)))
    optimizer = Muon(vector, shapes, lr=1.0, fused=False)
    vector.grad = torch.randn_like(vector)
    optimizer.step()
    by_adam, by_muon = vector.detach().abs().split([shape.numel() for shape in shapes])
    # Adam's first step, but where its ε counts beside a small gradient.
    torch.testing.assert_close(by_adam, torch.ones_like(by_adam), atol=0.01, rtol=0)
    assert float(by_muon.square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)


def test_it_goes_on_after_pickling():
    torch.manual_seed(0)
    start, gradients = torch.randn(20), torch.randn(6, 20)
    ends = []
    for pickled in (False, True):
        vector = nn.Parameter(start.clone())
        optimizer = Muon(vector, [torch.Size((5, 4))], lr=0.1, fused=False)
        for k, gradient in enumerate(gradients):
            vector.grad = gradient.clone()
            optimizer.step()
            if pickled and k == 2:
                optimizer, vector = pickle.loads(pickle.dumps((optimizer, vector)))
        ends.append(vector.detach())
    assert torch.equal(*ends)

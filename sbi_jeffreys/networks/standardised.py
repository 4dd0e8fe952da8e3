"""The main's input where x is a vector: transformed, z-scored, and if wide perhaps summarised."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sbi_jeffreys.networks.summaries import LinearSummaries
from sbi_jeffreys.networks.transforms import MarginalTransform, scale_of

__all__ = ["WIDE", "StandardisedInput"]

WIDE = 30  # with more outputs, x counts as wide, and outputs independent of θ may be left out


class StandardisedInput(nn.Module):
    """Marginal transform of x followed by z-scoring, as the main's embedding net.

    Outputs may be left out: the network then gets their mean in place of their values. Of more than
    thirty outputs without cells (a signal), the network gets thirty linear combinations, which are
    trained with the network, or, after `use_summaries`, linear summaries that are given.

    Args:
        transform: T.
        x: Training simulations `(N, dim_x)`.
    """

    shift: Tensor
    factor: Tensor
    gain: Tensor

    def __init__(self, transform: MarginalTransform, x: Tensor) -> None:
        super().__init__()
        self.transform = transform
        y = transform(x)
        std = scale_of(y) if len(y) > 1 else torch.ones_like(y[0])
        # Constants, but parameters: sbi asks an embedding net's first parameter for its device.
        self.mean = nn.Parameter(y.mean(dim=0), requires_grad=False)
        self.std = nn.Parameter(std, requires_grad=False)
        self.used = nn.Parameter(torch.ones_like(self.mean), requires_grad=False)
        signal = y.shape[1] > WIDE and not bool(transform.has_cells.any())
        self.mix = nn.Linear(y.shape[1], WIDE, bias=False).to(y) if signal else None
        # Everything exists from the start, so that earlier weights can be loaded again if better.
        one = torch.ones_like(self.mean)
        blank = LinearSummaries(0 * one, one, y.new_zeros(len(one), WIDE - 1))
        self.summaries = blank if signal else None
        for name in ("shift", "factor", "gain"):
            self.register_parameter(name, nn.Parameter(y.new_zeros(WIDE), requires_grad=False))
        self.summarises = nn.Parameter(y.new_zeros(()), requires_grad=False)

    def use_only(self, columns: Tensor) -> None:
        """Leave out every output whose index is not among `columns`."""
        kept = torch.isin(self.transform.keep, columns.to(self.transform.keep))
        self.used.copy_(kept)

    def transforms_as(self, transform: MarginalTransform) -> bool:
        """Whether T is the same and there is a place for summaries of it."""
        own, other = self.transform.state_dict(), transform.state_dict()
        same = own.keys() == other.keys() and all(torch.equal(own[k], other[k]) for k in own)
        return same and self.summaries is not None

    def use_summaries(self, summaries: LinearSummaries, x: Tensor) -> None:
        """Pass on these summaries of T(x) alone, standardised by simulations x `(N, dim_x)`."""
        assert self.summaries is not None
        num = summaries.directions.shape[1]
        self.summaries.centre.copy_(summaries.centre)
        self.summaries.scale.copy_(summaries.scale)
        self.summaries.directions.zero_()
        self.summaries.directions[:, -num:] = summaries.directions
        values = self.summaries(self.transform(x))
        low, middle, high = torch.quantile(values, torch.tensor([0.16, 0.5, 0.84]).to(values), 0)
        self.shift.copy_(middle)
        width = 0.5 * (high - low)
        self.factor.copy_(torch.where(width > 0, 1 / width, 0.0))
        std = torch.asinh(self.factor * (values - self.shift)).std(dim=0)
        # A network with thirty inputs starts with small weights for each of them: fewer inputs are
        # scaled up.
        gain = math.sqrt(WIDE / (num + 1)) / std
        self.gain.copy_(torch.where(std > 0, gain, 0.0))
        self.summarises.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.transform(x)
        if self.summaries is None or not bool(self.summarises):
            values = self.used * (y - self.mean) / self.std
            return values if self.mix is None else self.mix(values)
        # Draws of the proxy can be far outside the simulations in a few directions.
        return self.gain * torch.asinh(self.factor * (self.summaries(y) - self.shift))

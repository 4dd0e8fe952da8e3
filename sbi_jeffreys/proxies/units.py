"""Units in which the experts of a likelihood proxy see parameters and outputs.

A binary output coded 0 and 0.5, or −1 and 1, is as discrete as one coded 0 and 1, but only integers
without gaps get cells of probability (`networks.transforms`): a density of the others degenerates.
And the z-scoring of sbi's estimators takes a standard deviation below 1e-7 for zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sbi_jeffreys.networks.transforms import TINY, scale_of, varying
from sbi_jeffreys.proxies.experts.base import FEW_VALUES

__all__ = ["Units"]

_ROWS = 4  # least rows per distinct value; with fewer rows, values may be few by chance
_ON = 1e-3  # distance from a point of a lattice, in its spacings, that counts as rounding


class Units(nn.Module):
    """Values as counts where they are few and equally spaced (a lattice), and scaled where tiny.

    Calling it maps `(*B, D)` to the same shape; other columns stay as they are.

    Args:
        origin: The smallest value of a lattice, else 0, `(D,)`.
        unit: The spacing of a lattice, the standard deviation of tiny values, else 1, `(D,)`.
        lattice: Which columns are counted, `(D,)`.

    Attributes:
        some: Whether any column is counted or scaled.

    Example:
        >>> units = Units.fit(torch.tensor([[-1.0], [1.0]]).repeat(10, 1))
        >>> units(torch.tensor([[-1.0], [1.0]])).flatten()
        tensor([0., 1.])
    """

    origin: Tensor
    unit: Tensor
    lattice: Tensor

    def __init__(self, origin: Tensor, unit: Tensor, lattice: Tensor) -> None:
        super().__init__()
        self.register_buffer("origin", origin)
        self.register_buffer("unit", unit)
        self.register_buffer("lattice", lattice)
        self.some = bool((lattice | (unit != 1)).any())

    @classmethod
    def fit(cls, values: Tensor, count: bool = True) -> Units:
        """Find the tiny columns of values `(N, D)` and, if asked to, those to be counted."""
        scale, varies = scale_of(values), varying(values)
        tiny = (scale < TINY) & varies
        unit = torch.where(tiny, scale, 1.0)
        origin = torch.zeros_like(unit)
        lattice = torch.zeros_like(tiny)
        if not count:
            return cls(origin, unit, lattice)
        ordered = values.detach().double().sort(dim=0).values
        few = (ordered.diff(dim=0) > 0).sum(dim=0) < min(FEW_VALUES, len(values) // _ROWS)
        for d in torch.where(few & varies)[0].tolist():
            distinct = ordered[:, d].unique_consecutive()
            spacing = distinct.diff().min()
            steps = (distinct - distinct[0]) / spacing
            on_it = bool(((steps - steps.round()).abs() < _ON).all()) and steps[-1] < FEW_VALUES
            integer = bool((distinct == distinct.round()).all())
            # mutant: lattices-as-densities
            if on_it and not (integer and float(spacing) == 1.0):
                origin[d], unit[d], lattice[d] = distinct[0], spacing, True
        return cls(origin, unit, lattice)

    @property
    def log_det(self) -> Tensor:
        """log |det| of the map, `()`: values of a lattice have probabilities and contribute 0."""
        return -torch.where(self.lattice, 1.0, self.unit).log().sum()

    def forward(self, values: Tensor) -> Tensor:
        """Values `(*B, D)` in these units."""
        if not self.some:  # as nearly always, and for every evaluation of a proxy
            return values
        counted = (values - self.origin) / self.unit
        whole = counted.round()
        return torch.where(self.lattice & ((counted - whole).abs() < _ON), whole, counted)

    def inverse(self, counted: Tensor) -> Tensor:
        """The values `(*B, D)` that have been counted."""
        return self.origin + self.unit * counted if self.some else counted

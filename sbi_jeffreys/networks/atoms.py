"""Atoms: single values that an otherwise continuous output takes with positive probability.

Exact zeros of rainfall and values at a detection limit have a probability, but no density. Each one
gets an interval of T(x), its cell, between those of smaller and of larger values:

    … smaller values │ gap │ cell of width w │ gap │ larger values …

Everything from one bar to the other stands for the atom, but an observed atom is spread over the
cell alone: density that a network smooths over the cell's ends then still counts for the atom.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["Atoms", "find_atoms"]

_MOST = 2  # atoms of one output, such as a lower and an upper limit
_LEAST_ROWS = 10  # fewest rows with an atom, and fewest rows without any
_LEAST_SHARE = 0.03  # least share of the rows in which an atom occurs
_DISTINCT = 0.5  # least share of the other values that are distinct; with less, they are a grid
_WIDTH = 2.0  # width of a cell, in standard deviations of the other values of T(x)
_GAP = 0.5  # gap on either side of a cell, in widths of the cell
_MARGIN = 0.5  # largest distance of an atom beyond the other values, in standard deviations


def find_atoms(values: Tensor) -> Tensor:
    """The atoms of outputs `(N, D)` in ascending order, `(2, D)`, padded with ∞.

    A value is an atom if it occurs in at least 3 % of the rows and in at least ten of them; an
    output has two atoms at most. An output whose other values are from a grid, such as rounded
    values, has no atoms.
    """
    num = len(values)
    atoms = torch.full((_MOST, values.shape[1]), torch.inf).to(values)
    least = max(_LEAST_ROWS, math.ceil(_LEAST_SHARE * num))
    if num < least + _LEAST_ROWS:
        return atoms
    ordered = values.sort(dim=0).values
    repeated = (ordered[least - 1 :] == ordered[: num - least + 1]).any(dim=0)
    for d in torch.where(repeated)[0].tolist():
        distinct, counts = ordered[:, d].unique_consecutive(return_counts=True)
        most = counts.topk(min(_MOST, len(counts)))
        found = most.indices[most.values >= least]
        others, num_distinct = num - int(counts[found].sum()), len(distinct) - len(found)
        # mutant: grid-taken-for-atoms
        if others >= _LEAST_ROWS and num_distinct > _DISTINCT * others:
            atoms[: len(found), d] = distinct[found].sort().values
    return atoms


class Atoms(nn.Module):
    """The atoms of outputs, and the intervals of T(x) that stand for them.

    If the smallest value of all is an atom, every smaller x counts as this atom, and every T(x)
    below its cell stands for it. The same holds above for the largest value.

    Attributes:
        values: The atoms, `(2, D)`, ∞ where there are fewer than two.
        low: Every x from `low` to `high` counts as the atom, `(2, D)`.
        high: See `low`.
        start: Every T(x) from `start` to `end` stands for the atom, `(2, D)`.
        end: See `start`.
        middle: The middle of the cell, `(2, D)`.
        width: The width of the cells, `(D,)`.
        limits: T(x) without cells at a smallest and a largest atom, `(2, D)`, else ∓∞.
        some: Whether there are any atoms.
    """

    values: Tensor
    low: Tensor
    high: Tensor
    start: Tensor
    end: Tensor
    middle: Tensor
    width: Tensor
    limits: Tensor

    def __init__(self, **buffers: Tensor) -> None:
        super().__init__()
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)
        self.some = bool(self.of.any())

    @classmethod
    def fit(cls, values: Tensor, images: Tensor, x: Tensor, others: list[Tensor]) -> Atoms:
        """Place the cells.

        Args:
            values: From `find_atoms`, `(2, D)`.
            images: T of the atoms without cells, `(2, D)`.
            x: Outputs `(N, D)`.
            others: T of the other values of each output, without cells, `(N_d,)` each.
        """
        exists = torch.isfinite(values)
        smallest, largest = values == x.amin(dim=0), values == x.amax(dim=0)
        spread = torch.stack([column.std() for column in others])
        bottom = torch.stack([column.amin() for column in others]) - _MARGIN * spread
        top = torch.stack([column.amax() for column in others]) + _MARGIN * spread
        # Far from the other values, as zero is for a log, an atom would stretch the scale.
        place = torch.minimum(torch.maximum(images, bottom), top)
        whole = (1 + 2 * _GAP) * _WIDTH * spread
        start = place + torch.tensor([[0.0], [1.0]]).to(x) * whole
        lower = torch.where(smallest, place, -torch.inf).amax(dim=0)
        upper = torch.where(largest, place, torch.inf).amin(dim=0)
        nowhere = torch.where(exists, 0.0, torch.inf)
        return cls(
            values=values,
            low=torch.where(smallest, -torch.inf, values),  # mutant: limits-not-open
            high=torch.where(largest, torch.inf, torch.where(exists, values, -torch.inf)),
            start=torch.where(smallest, -torch.inf, start + nowhere),
            end=torch.where(largest, torch.inf, start + whole + nowhere),
            middle=start + 0.5 * whole,
            width=_WIDTH * spread,
            limits=torch.stack([lower, upper]),
        )

    @property
    def of(self) -> Tensor:
        """Which outputs have atoms, `(D,)`."""
        return torch.isfinite(self.values[0])

    @property
    def _whole(self) -> Tensor:
        """Width of a cell with the gaps beside it, `(D,)`."""
        return (1 + 2 * _GAP) * self.width

    def at(self, x: Tensor) -> Tensor:
        """Where outputs `(*B, D)` are at an atom, `(*B, D)`."""
        return self._at(x, 0) | self._at(x, 1)

    def _at(self, x: Tensor, k: int) -> Tensor:
        return (x >= self.low[k]) & (x <= self.high[k])

    def _placed(self, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
        """y with atoms at their places `(2, D)`."""
        for k in range(_MOST):
            y = torch.where(self._at(x, k), places[k], y)
        return y

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """T(x) `(*B, D)` from y, T(x) without cells; an atom is at the middle of its cell."""
        if not self.some:
            return y
        y = torch.minimum(torch.maximum(y, self.limits[0]), self.limits[1])
        larger = (x > self.values[0]).to(y) + (x > self.values[1])
        return self._placed(x, y + self._whole * larger, self.middle)

    def ends(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Ends of the intervals that stand for the atoms among x, else y, `(*B, D)` each."""
        return self._placed(x, y, self.start), self._placed(x, y, self.end)

    def noise(self, x: Tensor) -> Tensor | float:
        """Noise that spreads the atoms among x `(*B, D)` over their cells; zero elsewhere."""
        return (torch.rand_like(x) - 0.5) * self.width * self.at(x) if self.some else 0.0

    def log_slopes(self, x: Tensor, slopes: Tensor) -> Tensor:
        """The log width of its cell at every atom among x, and the slopes elsewhere, `(*B, D)`."""
        return torch.where(self.at(x), self.width.log(), slopes) if self.some else slopes

    def remove(self, y: Tensor) -> Tensor:
        """The inverse of `add`, except for atoms: see `restore`."""
        if not self.some:
            return y
        larger = (y >= self.end[0]).to(y) + (y >= self.end[1])
        return y - self._whole * larger

    def restore(self, x: Tensor, y: Tensor) -> Tensor:
        """x with the atom wherever T(x) = y stands for one, `(*B, D)` all."""
        for k in range(_MOST if self.some else 0):
            x = torch.where((y >= self.start[k]) & (y < self.end[k]), self.values[k], x)
        return x

r"""Monotone marginal transforms of x, under which the posterior is unchanged.

p(θ|x) = p(θ|T(x)) for any bijection T that does not depend on θ, so T may be chosen for what a
network learns best. Counts are dequantised (a density of integers is degenerate), single values
that an otherwise continuous output takes time and again, such as zero, get cells of their own
(`networks.atoms`), and constant dimensions, which have no density, are dropped. The choice per
dimension is Box & Cox's (1964): the profile log-likelihood of a Gaussian for the transformed
values, Jacobian included, among identity, square root, log and scaled arsinh. More than 20 outputs
are taken for a signal, whose neighbouring outputs belong together: all of them share one transform,
or none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sbi_jeffreys._checks import check_tensor
from sbi_jeffreys.networks.atoms import Atoms, find_atoms

__all__ = ["TINY", "MarginalTransform", "scale_of", "varying"]

TINY = 1e-6  # standard deviation that sbi's z-scoring would hardly see
_MAX_SMALL_COUNT = 4.0  # counts up to this (binary data among them) keep their scale
_MAX_OWN_SCALES = 20  # outputs up to which each has a transform of its own
_RESOLVED = 2.0  # spread, in units of float32's spacing, from which an output counts as varying
_MAX_COUNT = 2**22  # from twice that on, every number of float32 is an integer
_MIN_GAIN = 0.05  # nats per datum that a transform must win over the identity: Occam's margin


def varying(x: Tensor) -> Tensor:
    """Which columns of `(N, dim)` vary by more than the rounding of float32, `(dim,)`."""
    wide = x.detach().double()
    low, high = wide.aminmax(dim=0)
    return high - low > _RESOLVED * _spacing(wide)


def _spacing(wide: Tensor) -> Tensor:
    """float32's spacing at the largest value of each column of `(N, dim)`, `(dim,)`."""
    return torch.finfo(torch.float32).eps * wide.abs().amax(dim=0)


def scale_of(values: Tensor) -> Tensor:
    """Standard deviation of each column of `(N, dim)`, whatever its unit; 1 where it is constant.

    A scale is at least float32's rounding, so that dividing by it does not amplify rounding errors.
    """
    wide = values.detach().double()
    least = _spacing(wide)  # mutant: scales-in-units-of-one
    scale = torch.maximum(wide.std(dim=0).nan_to_num(0.0), least)
    return torch.where(scale > 0, scale, 1.0).to(values)


class _Kind(NamedTuple):
    """A monotone function, the logarithm of its derivative, and its inverse."""

    value: Callable[[Tensor], Tensor]
    log_slope: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


_KINDS = {
    "identity": _Kind(lambda u: u, torch.zeros_like, lambda t: t),
    "log": _Kind(torch.log, lambda u: -u.log(), torch.exp),
    "sqrt": _Kind(
        torch.sqrt, lambda u: -0.5 * u.log() - math.log(2.0), lambda t: t.clamp_min(0.0) ** 2
    ),
    "asinh": _Kind(torch.asinh, lambda u: -0.5 * torch.log1p(u**2), torch.sinh),
}
_POSITIVE = ("log", "sqrt")  # kinds for positive outputs only
_SCALED = "asinh"  # the kind that needs its output centred and scaled


def _scores(v: Tensor, centre: Tensor, scale: Tensor) -> dict[str, float]:
    """Gaussian profile log-likelihood per datum of every kind, −∞ where it is not admissible."""
    is_positive = bool((v > 0).all())
    scores = dict.fromkeys(_KINDS, -math.inf)
    for name, kind in _KINDS.items():
        if is_positive or name not in _POSITIVE:
            u = (v - centre) / scale if name == _SCALED else v
            log_slope = kind.log_slope(u) - (scale.log() if name == _SCALED else 0.0)
            log_variance = kind.value(u).var().clamp_min(1e-300).log()
            scores[name] = float(-0.5 * log_variance + log_slope.mean())
    return scores


def _best(scores: dict[str, float]) -> str:
    """The kind of the largest score per datum, if it wins enough over the identity."""
    best = max(scores, key=lambda kind: scores[kind])
    return best if scores[best] > scores["identity"] + _MIN_GAIN else "identity"


def _choose(v: list[Tensor], centre: Tensor, scale: Tensor, integer: Tensor) -> list[str]:
    """The kinds of outputs `(N_d,)`: the best shared one for a signal, otherwise the best of each.

    Counts take the square root, which stabilises their variance (Anscombe 1948), while a log
    magnifies the noise of small counts.
    """
    num = len(v)
    scores = [_scores(v[d], centre[d], scale[d]) for d in range(num)]
    if num > _MAX_OWN_SCALES:
        means = {kind: sum(score[kind] for score in scores) / num for kind in _KINDS}
        return ["identity" if bool(integer.any()) else _best(means)] * num
    kinds = [_best(score) for score in scores]
    for d in torch.where(integer)[0].tolist():
        if float(v[d].min()) > 0:
            kinds[d] = "sqrt" if float(v[d].max()) > _MAX_SMALL_COUNT else "identity"
    return kinds


class MarginalTransform(nn.Module):
    """Per-dimension monotone transform of vector-valued x, `(*B, dim_x)` → `(*B, dim_kept)`.

    Build it with `MarginalTransform.fit(x)`. Calling it maps integer-valued dimensions through
    their cell's midpoint n + ½, and an atom to the middle of its cell; `dequantise` draws a point
    of the cell uniformly instead, which is what a density should be trained on (Theis et al. 2016,
    arXiv 1511.01844). The density of x at an atom is its probability, that of its cell.

    Attributes:
        kinds: One of identity, log, sqrt, asinh per kept dimension.
        dim_in: Number of dimensions of x.
        dim_out: Number of dimensions kept (those that vary).
    """

    atoms: Atoms
    keep: Tensor
    integer: Tensor
    centre: Tensor
    scale: Tensor
    floor: Tensor
    constant: Tensor

    def __init__(self, kinds: list[str], **buffers: Tensor) -> None:
        super().__init__()
        self.kinds = kinds
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)
        self.dim_in, self.dim_out = self.constant.numel(), self.keep.numel()

    def get_extra_state(self) -> Tensor:
        """The kinds, as indices: weights of one transform mean nothing under another."""
        return torch.tensor([list(_KINDS).index(kind) for kind in self.kinds])

    def set_extra_state(self, state: Tensor) -> None:
        """Take the kinds from a state that is loaded."""
        self.kinds = [list(_KINDS)[index] for index in state.tolist()]  # mutant: kinds-not-loaded

    @classmethod
    def fit(cls, x: Tensor, choose: bool = True, atoms: bool = True) -> MarginalTransform:
        """Choose the transform from simulations x of shape `(N, dim_x)`, finite.

        Args:
            x: Simulations.
            choose: If False, every dimension keeps its scale; constants are still dropped and
                integers dequantised.
            atoms: Whether atoms get cells. Where x is the input of a network, cells would add
                jumps to a smooth function of x.

        Raises:
            TypeError: If x is no tensor of floats.
            ValueError: If x is not a matrix, not finite, or constant in every dimension.
        """
        remedy = "structured or incomplete x needs an embedding net and the energy proxy"
        check_tensor("x", x, ("N", "dim_x"), finite=True, remedy=remedy)
        wide = x.detach().to("cpu", torch.float64)
        varies = varying(wide)
        if not bool(varies.any()):
            raise ValueError(
                f"x is constant over all {len(x)} simulations in every dimension, as far as "
                "float32 can tell: it carries no information on theta. Check the simulator's "
                "output; subtract a large offset."
            )
        keep = varies.nonzero().squeeze(-1)
        kept = wide[:, keep]
        # mutant: large-units-are-counts
        integer = ((kept == kept.round()) & (kept.abs() < _MAX_COUNT)).all(dim=0)
        # mutant: atoms-without-cells
        found = find_atoms(kept if atoms else kept[:0])
        found[:, integer] = torch.inf  # mutant: counts-with-atoms
        # The kind is chosen for the values that are not at an atom.
        mixed = kept + 0.5 * integer
        columns = [column[~at] for column, at in zip(mixed.T, (kept == found[:, None]).any(0).T)]
        centre = torch.stack([column.median() for column in columns])
        quarters = torch.tensor([0.25, 0.75]).to(wide)
        ends = torch.stack([column.quantile(quarters) for column in columns], dim=1)
        deviation = torch.stack([column.std() for column in columns]).clamp_min(1e-30)
        scale = torch.where(ends[1] > ends[0], ends[1] - ends[0], deviation)
        kinds = _choose(columns, centre, scale, integer) if choose else ["identity"] * len(keep)
        scaled = torch.tensor([kind == _SCALED for kind in kinds])
        centre, scale = torch.where(scaled, centre, 0.0), torch.where(scaled, scale, 1.0)
        positive = torch.tensor([kind in _POSITIVE for kind in kinds])
        # A new x below the smallest one seen stays in the domain of log and sqrt.
        least = torch.stack([column.amin() for column in columns])
        floor = torch.where(positive, least / 10, -torch.inf)
        fitted = {"centre": centre, "scale": scale, "floor": floor, "constant": wide[0]}
        as_x = {name: buffer.to(x.device, x.dtype) for name, buffer in fitted.items()}
        new = cls(kinds, keep=keep.to(x.device), integer=integer.to(x.device), **as_x)
        new.atoms = new._placed(found.to(x), x.detach()[:, new.keep])
        return new

    def _placed(self, found: Tensor, kept: Tensor) -> Atoms:
        """The cells of the atoms found, `(2, dim_out)`, of kept outputs `(N, dim_out)`."""
        continuous = ~(kept == found[:, None]).any(dim=0)
        images = self._smooth(kept + 0.5 * self.integer)
        others = [column[where] for column, where in zip(images.T, continuous.T)]
        return Atoms.fit(found, self._smooth(found), kept, others)

    @property
    def is_identity(self) -> bool:
        """Whether T changes nothing: every dimension is kept as it is, and none has cells."""
        plain = all(kind == "identity" for kind in self.kinds)
        return plain and self.dim_out == self.dim_in and not bool(self.has_cells.any())

    @property
    def has_cells(self) -> Tensor:
        """Which kept outputs have values with a probability of their own, `(dim_out,)`."""
        return self.integer | self.atoms.of

    def in_cell(self, values: Tensor) -> Tensor:
        """Where kept outputs have a cell: all integers, and atoms; `(*B, dim_out)`."""
        return self.integer | self.atoms.at(values)

    def _kept(self, x: Tensor) -> Tensor:
        """Outputs that are not constant, not to be changed in place: `(*B, dim_out)`."""
        return x if self.dim_out == self.dim_in else x[..., self.keep]

    def _scaled(self, v: Tensor) -> Tensor:
        return ((v - self.centre) / self.scale).clamp_min(self.floor)

    def _smooth(self, v: Tensor) -> Tensor:
        """T(v) without the cells of atoms."""
        return self._each("value", self._scaled(v))

    def _each(self, name: str, u: Tensor) -> Tensor:
        """The function called `name` of each dimension's `_Kind`, applied to u `(*B, dim_out)`."""
        if len(set(self.kinds)) == 1:  # a call for each of a thousand outputs would take long
            return getattr(_KINDS[self.kinds[0]], name)(u)
        columns = [getattr(_KINDS[kind], name)(u[..., d]) for d, kind in enumerate(self.kinds)]
        return torch.stack(columns, dim=-1)

    def _values(self, v: Tensor) -> Tensor:
        return self.atoms.add(v, self._smooth(v))

    def forward(self, x: Tensor) -> Tensor:
        """T(x) at the midpoint of cells: `(*B, dim_in)` → `(*B, dim_out)`."""
        return self._values(self._kept(x) + 0.5 * self.integer)

    def dequantise(self, x: Tensor) -> Tensor:
        """T(x) with values that have a cell spread uniformly over it: fresh noise each call."""
        return self.dequantised(x)[0]

    def dequantised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """T(x) as of `dequantise`, and log |det ∂T/∂x| there, `(*B,)`."""
        kept = x[..., self.keep]
        noisy = kept + (torch.rand_like(kept) - 0.5) * self.integer
        # mutant: atoms-not-spread
        y = self._values(noisy + 0.5 * self.integer) + self.atoms.noise(kept)
        return y, self.log_slopes(noisy).sum(dim=-1)

    def log_det(self, x: Tensor) -> Tensor:
        """log |det ∂T/∂x| at the midpoint of cells, shape `(*B,)`."""
        return self.log_slopes(self._kept(x)).sum(dim=-1)

    def cell(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """T at both ends of the cells of kept outputs, `(*B, dim_out)`; see `in_cell`.

        The cell of an integer is [n, n + 1); that of an atom is all that T⁻¹ maps to the atom.
        """
        low, high = self.atoms.ends(values, self._values(values))
        return low, torch.where(self.integer, self._values(values + 1.0), high)

    def log_slopes(self, values: Tensor) -> Tensor:
        """log |∂T/∂x| of each kept output at the midpoint of cells, `(*B, dim_out)`.

        For an atom, it is the log width of its cell.
        """
        u = self._scaled(values + 0.5 * self.integer)
        slopes = self._each("log_slope", u) - self.scale.log()
        # mutant: atoms-as-densities
        return self.atoms.log_slopes(values, slopes)

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest T(x) of simulations `(N, dim_in)`, with whole cells of integers."""
        kept = x[..., self.keep]
        return self._values(kept.amin(0)), self._values(kept.amax(0) + 1.0 * self.integer)

    def inverse(self, y: Tensor) -> Tensor:
        """x with T(x) = y, integers and atoms restored, dropped dimensions at their constant."""
        v = self._each("inverse", self.atoms.remove(y)) * self.scale + self.centre
        x = self.constant.expand(*y.shape[:-1], self.dim_in).clone()
        x[..., self.keep] = self.atoms.restore(torch.where(self.integer, v.floor(), v), y)
        return x

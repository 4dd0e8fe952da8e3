r"""Monotone marginal transforms of x, under which the posterior is unchanged.

p(θ|x) = p(θ|T(x)) for any bijection T that does not depend on θ, so a density of T(x) is as good a
likelihood as a density of x, and T may be chosen for what a network learns best. Counts are
dequantised (a density of integers is degenerate), positive heavy-tailed outputs are logged, and
constant dimensions, which have no density, are dropped.

Up to 20 outputs have a transform each. Beyond that x is taken for a signal, whose neighbouring
outputs belong together: all of them share one, or none.

The choice per dimension is Box & Cox's (1964): the profile log-likelihood of a Gaussian for the
transformed values, Jacobian included, among identity, square root, log and scaled arsinh.
"""

from __future__ import annotations

import math

import torch
from sbi.utils import MultipleIndependent, mcmc_transform, within_support
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints

__all__ = ["MarginalTransform", "PriorTransform", "inside_support", "is_bounded", "on_edge"]

_KINDS = ("identity", "log", "sqrt", "asinh")
_MAX_SMALL_COUNT = 4.0  # counts up to this (binary data among them) keep their scale
_EDGE = 15.5  # a logit of 1 − 2e-7: as close to the edge as float32 tells
_MAX_OWN_SCALES = 20  # outputs up to which each has a transform of its own
_RESOLVED = 8.0  # spread, in units of float32's spacing, from which an output counts as varying
_MIN_GAIN = 0.05  # nats per datum that a transform must win over the identity: Occam's margin


def _candidates(v: Tensor, centre: Tensor, scale: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Transformed values and log-derivatives of every admissible kind, for one dimension `(N,)`."""
    out = {"identity": (v, torch.zeros_like(v))}
    if bool((v > 0).all()):
        out["log"] = (v.log(), -v.log())
        out["sqrt"] = (v.sqrt(), -0.5 * v.log() - math.log(2.0))
    z = (v - centre) / scale
    out["asinh"] = (torch.asinh(z), -0.5 * torch.log1p(z**2) - scale.log())
    return out


def _choose_shared(values: Tensor, centre: Tensor, scale: Tensor, integer: Tensor) -> list[str]:
    """One kind for all outputs `(N, D)`, as of a signal: that of the largest total score."""
    totals: dict[str, float] = {}
    num = values.shape[1]
    for d in range(num):
        for kind, score in _scores(values[:, d], centre[d], scale[d]).items():
            totals[kind] = totals.get(kind, 0.0) + score
        positive = bool((values[:, d] > 0).all())
        if not positive:  # then neither log nor root is admissible for all
            totals["log"] = totals["sqrt"] = -math.inf
    best = max(totals, key=lambda kind: totals[kind])
    gains = totals[best] > totals["identity"] + _MIN_GAIN * num
    return [best if gains and not bool(integer.any()) else "identity"] * num


def _scores(v: Tensor, centre: Tensor, scale: Tensor) -> dict[str, float]:
    """Gaussian profile log-likelihood per datum of every admissible kind."""
    return {
        kind: float(-0.5 * t.var().clamp_min(1e-24).log() + log_jac.mean())
        for kind, (t, log_jac) in _candidates(v, centre, scale).items()
    }


def _choose(v: Tensor, centre: Tensor, scale: Tensor, integer: bool) -> str:
    """The kind with the largest Gaussian profile log-likelihood; for counts, the square root.

    The root stabilises the variance of counts (Anscombe 1948), while a log magnifies the noise of
    small ones: on the tuning tasks with counts it was 0.1–0.5 nats better for the main.
    """
    if integer and bool((v > 0).all()):
        return "sqrt" if float(v.max()) > _MAX_SMALL_COUNT else "identity"
    scores = _scores(v, centre, scale)
    best = max(scores, key=lambda kind: scores[kind])
    return best if scores[best] > scores["identity"] + _MIN_GAIN else "identity"


class MarginalTransform(nn.Module):
    """Per-dimension monotone transform of vector-valued x, `(*B, dim_x)` → `(*B, dim_kept)`.

    Build it with `MarginalTransform.fit(x)`. Calling it maps integer-valued dimensions through
    their cell's midpoint n + ½; `dequantise` draws a point of the cell uniformly instead, which is
    what a density should be trained on (Theis et al. 2016, arXiv 1511.01844).

    Attributes:
        kinds: One of identity, log, sqrt, asinh per kept dimension.
        dim_in: Number of dimensions of x.
        dim_out: Number of dimensions kept (those that vary).
    """

    keep: Tensor
    integer: Tensor
    centre: Tensor
    scale: Tensor
    floor: Tensor
    constant: Tensor

    def __init__(
        self,
        kinds: list[str],
        keep: Tensor,
        integer: Tensor,
        centre: Tensor,
        scale: Tensor,
        floor: Tensor,
        constant: Tensor,
    ) -> None:
        super().__init__()
        self.kinds = kinds
        for name, buffer in (
            ("keep", keep),
            ("integer", integer),
            ("centre", centre),
            ("scale", scale),
            ("floor", floor),
            ("constant", constant),
        ):
            self.register_buffer(name, buffer)
        self.dim_in, self.dim_out = constant.numel(), keep.numel()

    @classmethod
    def fit(cls, x: Tensor, choose: bool = True) -> MarginalTransform:
        """Choose the transform from simulations x of shape `(N, dim_x)`, finite.

        Args:
            x: Simulations.
            choose: If False, every dimension keeps its scale; constants are still dropped and
                integers dequantised.

        Raises:
            ValueError: If x is not a matrix, not finite, or constant in every dimension.
        """
        if x.ndim != 2:
            raise ValueError(
                f"x must have shape (N, dim_x) for marginal transforms, got {tuple(x.shape)}; "
                "structured x needs an embedding net and the energy proxy."
            )
        if not bool(torch.isfinite(x).all()):
            raise ValueError(
                "x contains NaN or inf; drop those simulations or use an embedding net."
            )
        wide = x.detach().to("cpu", torch.float64)
        spacing = torch.finfo(torch.float32).eps * wide.abs().amax(dim=0)
        varies = wide.amax(dim=0) - wide.amin(dim=0) > _RESOLVED * spacing
        if not bool(varies.any()):
            raise ValueError(
                f"x is constant over all {len(x)} simulations in every dimension, as far as "
                "float32 can tell: it carries no information on theta. Check the simulator's "
                "output; subtract a large offset."
            )
        keep = varies.nonzero().squeeze(-1)
        kept = wide[:, keep]
        integer = (kept == kept.round()).all(dim=0)
        kept = kept + 0.5 * integer
        centre = kept.median(dim=0).values
        spread = kept.quantile(0.75, dim=0) - kept.quantile(0.25, dim=0)
        scale = torch.where(spread > 0, spread, kept.std(dim=0).clamp_min(1e-12))
        if not choose:
            kinds = ["identity"] * len(keep)
        elif len(keep) > _MAX_OWN_SCALES:
            kinds = _choose_shared(kept, centre, scale, integer)
        else:
            kinds = [
                _choose(kept[:, d], centre[d], scale[d], bool(integer[d])) for d in range(len(keep))
            ]
        # A new x below the smallest one seen stays in the domain of log and sqrt.
        floor = torch.where(kept.amin(dim=0) > 0, kept.amin(dim=0) / 10, -torch.inf)
        as_x = [b.to(x.device, x.dtype) for b in (centre, scale, floor, wide[0])]
        return cls(kinds, keep.to(x.device), integer.to(x.device), *as_x)

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing: every dimension kept, as it is, none integer-valued."""
        plain = all(kind == "identity" for kind in self.kinds)
        return plain and self.dim_out == self.dim_in and not bool(self.integer.any())

    def _apply_kinds(self, v: Tensor) -> Tensor:
        columns = []
        for d, kind in enumerate(self.kinds):
            u = v[..., d]
            if kind == "log":
                u = u.clamp_min(self.floor[d]).log()
            elif kind == "sqrt":
                u = u.clamp_min(self.floor[d]).sqrt()
            elif kind == "asinh":
                u = torch.asinh((u - self.centre[d]) / self.scale[d])
            columns.append(u)
        return torch.stack(columns, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """T(x) at the midpoint of integer cells: `(*B, dim_in)` → `(*B, dim_out)`."""
        return self._apply_kinds(x[..., self.keep] + 0.5 * self.integer)

    def dequantise(self, x: Tensor) -> Tensor:
        """T(x + u) with u uniform in the cell of integer dimensions: fresh noise each call."""
        kept = x[..., self.keep]
        return self._apply_kinds(kept + torch.rand_like(kept) * self.integer)

    def log_det(self, x: Tensor) -> Tensor:
        """log |det ∂T/∂x| at the midpoint of integer cells, shape `(*B,)`."""
        kept = x[..., self.keep] + 0.5 * self.integer
        total = torch.zeros(kept.shape[:-1]).to(kept)
        for d, kind in enumerate(self.kinds):
            u = kept[..., d]
            if kind == "log":
                total = total - u.clamp_min(self.floor[d]).log()
            elif kind == "sqrt":
                total = total - 0.5 * u.clamp_min(self.floor[d]).log() - math.log(2.0)
            elif kind == "asinh":
                z = (u - self.centre[d]) / self.scale[d]
                total = total - 0.5 * torch.log1p(z**2) - self.scale[d].log()
        return total

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest T(x) over simulations `(N, dim_in)`, whole cells included."""
        kept = x[..., self.keep]
        return self._apply_kinds(kept.amin(0)), self._apply_kinds(kept.amax(0) + 1.0 * self.integer)

    def inverse(self, y: Tensor) -> Tensor:
        """x with T(x) = y, integers restored, dropped dimensions at their constant."""
        x = self.constant.expand(*y.shape[:-1], self.dim_in).clone()
        for d, kind in enumerate(self.kinds):
            u = y[..., d]
            if kind == "log":
                u = u.exp()
            elif kind == "sqrt":
                u = u.clamp_min(0.0) ** 2
            elif kind == "asinh":
                u = torch.sinh(u) * self.scale[d] + self.centre[d]
            x[..., self.keep[d]] = torch.floor(u) if bool(self.integer[d]) else u
        return x


def _is_bounded(constraint: constraints.Constraint) -> bool:
    """Whether a support constraint restricts the real line in any dimension."""
    base = getattr(constraint, "base_constraint", constraint)
    if isinstance(base, constraints.cat):
        return any(_is_bounded(part) for part in base.cseq)
    return base is not constraints.real and not isinstance(base, type(constraints.real))


class PriorTransform(nn.Module):
    """θ ↔ u, from the prior's support to unconstrained space (sbi's `mcmc_transform`).

    It keeps the bijection and the support, not the prior, so that it can be copied and pickled even
    where the prior cannot.

    Args:
        prior: A prior with bounded support.
    """

    def __init__(self, prior: Distribution) -> None:
        super().__init__()
        self.support = prior.support
        self.bijection: Transform = mcmc_transform(prior, device=str(_device_of(prior)))

    @classmethod
    def fit(cls, prior: Distribution) -> PriorTransform | None:
        """The transform of a continuous prior with bounded support, else None.

        None also where torch knows no bijection of the support that keeps its dimensions (a
        triangle, a simplex); see `is_bounded`.
        """
        if not is_bounded(prior):
            return None
        try:
            with torch.random.fork_rng(devices=[]):  # a trial leaves no trace in random numbers
                transform = cls(prior)
                theta = prior.sample(torch.Size((8,)))
            u, log_det, inside = transform(theta)
            back = transform.inverse(u)
            fits = u.shape == back.shape == theta.shape and bool(inside.all())
            close = fits and torch.allclose(back, theta, rtol=1e-2, atol=1e-4)
        except (NotImplementedError, RuntimeError, ValueError, AssertionError):
            return None
        return transform if close and bool(torch.isfinite(log_det).all()) else None

    def forward(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u = T(θ), log |det ∂u/∂θ| and whether θ is inside the support.

        Args:
            theta: Shape `(*B, D)`. Points outside are given a finite but meaningless u.

        Returns:
            Tensors of shapes `(*B, D)`, `(*B,)`, `(*B,)`.
        """
        flat = theta.reshape(-1, theta.shape[-1])
        inside = within_support(self, flat)
        u = torch.as_tensor(self.bijection(flat))
        finite = torch.isfinite(u).all(dim=-1) & inside
        u = torch.where(finite.unsqueeze(-1), u, torch.zeros_like(u))
        log_det = -self.bijection.inv.log_abs_det_jacobian(u, self.bijection.inv(u))
        shape = theta.shape[:-1]
        return u.reshape(theta.shape), log_det.reshape(shape), finite.reshape(shape)

    def inverse(self, u: Tensor) -> Tensor:
        """θ = T⁻¹(u), inside the support by construction."""
        flat = torch.as_tensor(self.bijection.inv(u.reshape(-1, u.shape[-1])))
        return flat.reshape(u.shape)


def inside_support(prior: Distribution, theta: Tensor) -> Tensor:
    """Which θ `(N, D)` lie in the prior's support, `(N,)`: sbi's `within_support`, part by part.

    sbi's joint of independent priors is asked part by part, because torch cannot concatenate
    supports that check single numbers (a box) with one that checks vectors (a simplex).
    """
    if not isinstance(prior, MultipleIndependent):
        return within_support(prior, theta)
    parts = zip(prior.dists, theta.split(prior.dims_per_dist, dim=-1))
    return torch.stack([within_support(part, columns) for part, columns in parts]).all(dim=0)


def is_bounded(prior: Distribution) -> bool:
    """Whether a continuous prior declares a support that is not all of ℝᴰ."""
    try:
        support = prior.support
    except (NotImplementedError, AttributeError):
        return False
    if support is None or getattr(support, "is_discrete", False):
        return False
    return _is_bounded(support)


def on_edge(transform: PriorTransform, theta: Tensor) -> Tensor:
    """Which θ `(N, D)` lie on the support's edge, where u is infinite but for rounding, `(N,)`.

    Draws of a continuous prior do so less than once in a million; clamped ones and grids do.
    """
    u, _, inside = transform(theta)
    return inside & (u.abs() > _EDGE).any(dim=-1)


def _device_of(prior: Distribution) -> torch.device:
    """Device of the prior's samples."""
    return prior.sample(torch.Size((1,))).device

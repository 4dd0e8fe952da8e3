"""The prior's support and its unconstrained space, in which the main models θ.

No mass of a density over u = T(θ), T a bijection from the support to ℝᴰ, lies outside the support.
"""

from __future__ import annotations

import math
from contextlib import suppress

import torch
from sbi.utils import MultipleIndependent, mcmc_transform, within_support
from sbi.utils.user_input_checks_utils import CustomPriorWrapper
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints
from torch.nn.functional import softplus

from sbi_jeffreys._sbi import silent_prior

__all__ = [
    "PriorTransform",
    "has_discrete_part",
    "has_no_volume",
    "hides_bounds",
    "inside_support",
    "is_bounded",
]

_EDGE = 15.5  # a logit of 1 − 2e-7: as close to the edge as float32 resolves
_FLAT = 1e-6  # extent of draws relative to the largest, below which it is that of rounding errors
_DRAWS = 100  # of a prior that tells little about itself
_FAR = 80.0  # a logit whose sigmoid is 2e-35: float32 still has it


def _probit(logit: Tensor) -> tuple[Tensor, Tensor]:
    """z with Φ(z) = σ(logit), and log dz/dlogit; accurate in both tails."""
    logit = logit.clamp(-_FAR, _FAR)
    zero, is_low = torch.zeros_like(logit), logit < 0
    low = torch.special.ndtri(torch.sigmoid(torch.where(is_low, logit, zero)))
    high = torch.special.ndtri(torch.sigmoid(-torch.where(is_low, zero, logit)))
    z = low - high  # one of the two is zero
    log_slope = -(softplus(logit) + softplus(-logit)) + 0.5 * (z**2 + math.log(2 * math.pi))
    return z, log_slope


def _logit(z: Tensor) -> Tensor:
    """The inverse of `_probit`."""
    return torch.special.log_ndtr(z) - torch.special.log_ndtr(-z)


class PriorTransform(nn.Module):
    """θ ↔ u, from the prior's support to unconstrained space.

    u is the logarithm for a half-line, as in sbi's `mcmc_transform`, and for an interval the probit
    in place of sbi's logit. A density that is flat up to the edge then becomes Gaussian, as a
    flow's base is. Under the logit it would be logistic, with tails that no flow with Gaussian
    tails can follow.

    The transform stores the bijection and the support, not the prior, so that it can be copied and
    pickled even where the prior cannot.

    Args:
        prior: A prior with bounded support.
    """

    is_interval: Tensor

    def __init__(self, prior: Distribution) -> None:
        super().__init__()
        self.support = prior.support
        theta = prior.sample(torch.Size((1,)))
        self.bijection: Transform = mcmc_transform(prior, device=str(theta.device))
        self.register_buffer("is_interval", self._saturates(theta, -1) & self._saturates(theta, 1))

    @torch.no_grad()
    def _saturates(self, theta: Tensor, sign: int) -> Tensor:
        """For each parameter, whether its support ends on this side, where u = ±∞."""
        origin, near, far = (
            torch.as_tensor(self.bijection.inv(torch.full_like(theta, sign * v)))
            for v in (0.0, 1.0, _FAR)
        )
        return ((far - origin).abs() < 10 * (near - origin).abs())[0]

    @classmethod
    def fit(cls, prior: Distribution | None) -> PriorTransform | None:
        """The transform of a continuous prior with bounded support, else None.

        None also where torch knows no bijection of the support that keeps its dimensions (a
        triangle, a simplex); see `is_bounded`.
        """
        if prior is None or not is_bounded(prior):
            return None
        try:
            # The trial does not change the state of torch's generator.
            with torch.random.fork_rng(devices=[]), silent_prior():
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
        v = torch.as_tensor(self.bijection(flat))
        finite = torch.isfinite(v).all(dim=-1) & inside
        v = torch.where(finite.unsqueeze(-1), v, torch.zeros_like(v))
        log_det = -self.bijection.inv.log_abs_det_jacobian(v, self.bijection.inv(v))
        z, log_slope = _probit(torch.where(self.is_interval, v, torch.zeros_like(v)))
        u = torch.where(self.is_interval, z, v)  # mutant: logit-instead-of-probit
        log_det = log_det + torch.where(self.is_interval, log_slope, 0.0).sum(dim=-1)
        shape = theta.shape[:-1]
        return u.reshape(theta.shape), log_det.reshape(shape), finite.reshape(shape)

    def inverse(self, u: Tensor) -> Tensor:
        """θ = T⁻¹(u), inside the support by construction."""
        flat = u.reshape(-1, u.shape[-1])
        z = torch.where(self.is_interval, flat, torch.zeros_like(flat))
        v = torch.where(self.is_interval, _logit(z), flat)
        return torch.as_tensor(self.bijection.inv(v)).reshape(u.shape)

    def on_edge(self, theta: Tensor) -> Tensor:
        """Which θ `(N, D)` lie on the support's edge, where u is infinite but for rounding, `(N,)`.

        Draws of a continuous prior do so less than once in a million; clamped θ and grids do.
        Only in an interval does rounding hide the edge: near 0, float32 resolves a half-line.
        """
        v = torch.as_tensor(self.bijection(theta))
        rounded = self.is_interval & (v.abs() > _EDGE)  # mutant: half-lines-by-the-logit
        return within_support(self, theta) & (rounded | torch.isinf(v)).any(dim=-1)


def inside_support(prior: Distribution, theta: Tensor) -> Tensor:
    """Which θ `(N, D)` lie in the prior's support, `(N,)`: sbi's `within_support`, part by part.

    sbi's joint of independent priors is asked part by part, because torch cannot concatenate
    supports that check single numbers (a box) with one that checks vectors (a simplex). A prior of
    a class of the user's own has all of ℝᴰ for a support unless bounds were given to
    `process_prior`; for such a prior, θ without a finite log density are outside as well.
    """
    if not isinstance(prior, MultipleIndependent):
        with silent_prior():
            inside = within_support(prior, theta)
            if isinstance(prior, CustomPriorWrapper):  # mutant: custom-priors-taken-at-their-word
                inside = inside & torch.isfinite(prior.log_prob(theta))
            return inside
    parts = zip(prior.dists, theta.split(prior.dims_per_dist, dim=-1))
    return torch.stack([within_support(part, columns) for part, columns in parts]).all(dim=0)


def hides_bounds(prior: Distribution | None) -> bool:
    """Whether a prior of the user's own class declares no bounds, but has no density far away."""
    if not isinstance(prior, CustomPriorWrapper) or is_bounded(prior):
        return False
    with torch.random.fork_rng(devices=[]), silent_prior():
        theta = prior.sample(torch.Size((_DRAWS,)))
        far = theta.mean(dim=0) + 100 * theta.std(dim=0) * torch.tensor([[-1.0], [1.0]]).to(theta)
        return bool(torch.isneginf(prior.log_prob(far)).all())


def has_no_volume(prior: Distribution) -> bool:
    """Whether the prior's draws lie in a hyperplane, as those of a simplex do: their sum is one."""
    with torch.random.fork_rng(devices=[]), silent_prior():
        theta = prior.sample(torch.Size((_DRAWS,))).double()
    spread = theta.std(dim=0)
    if 2 * theta.shape[1] > _DRAWS or not bool((spread > 0).all()):  # cannot tell
        return False
    sizes = torch.linalg.svdvals((theta - theta.mean(dim=0)) / spread)
    return bool(sizes[-1] < _FLAT * sizes[0])  # mutant: simplex-modelled


def has_discrete_part(prior: Distribution | None) -> bool:
    """Whether the prior declares that it draws some of the parameters from a discrete set."""
    for part in prior.dists if isinstance(prior, MultipleIndependent) else [prior]:
        with suppress(AttributeError, NotImplementedError):
            if part.support.is_discrete:  # type: ignore[union-attr]  # mutant: discrete-parameters-modelled
                return True
    return False


def is_bounded(prior: Distribution | None) -> bool:
    """Whether there is a continuous prior that declares a support that is not all of ℝᴰ."""
    try:
        support = None if prior is None else prior.support
    except (NotImplementedError, AttributeError):
        return False
    if support is None or getattr(support, "is_discrete", False):
        return False
    base = getattr(support, "base_constraint", support)
    parts = base.cseq if isinstance(base, constraints.cat) else [base]
    bases = [getattr(part, "base_constraint", part) for part in parts]
    return not all(isinstance(base, type(constraints.real)) for base in bases)

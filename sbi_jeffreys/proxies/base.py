"""The proxy's interface: an unnormalised density over θ given x, with an exact prior.

q_ψ(θ|x) ∝ q̃_ψ(θ, x) = p(θ) e^{γ f_ψ(θ, x)}, with an inverse temperature γ that is 1 unless held-out
pairs favour another (`training.temperature`). Subclasses define f_ψ: a learned log-likelihood
(`LikelihoodProxy`), a learned log-ratio (`EnergyProxy`), or a function of the user's
(`GivenProxy`). What is common to them is here: the prior's support, and the temperature.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from sbi_jeffreys._checks import check_callable
from sbi_jeffreys._sbi import silent_prior
from sbi_jeffreys.networks.prior_space import inside_support
from sbi_jeffreys.networks.transforms import scale_of

__all__ = ["EmpiricalPrior", "Proxy"]

_MAX_CENTRES = 10_000  # kernel centres of an empirical prior
_MAX_DISTANCES = 1_000_000  # between points and centres held at once: 4 MB each


class Proxy(nn.Module, ABC):
    """An energy over θ given x, E_ψ(θ, x) = −log p(θ) − γ f_ψ(θ, x).

    Args:
        prior: Prior p(θ) with `log_prob` and `sample`, event shape `(D,)`.

    Raises:
        TypeError: If the prior lacks one of these methods.

    Attributes:
        inverse_temperature: γ, a scalar; training changes it for proxies that `can_be_tempered`.
    """

    #: Whether `sample_joint` can draw pairs (θ̃, x̃) without the simulator.
    can_sample: bool = False
    #: Whether f_ψ was fitted as a density of x, not of θ: held-out pairs can improve its scale.
    can_be_tempered: bool = False
    #: Whether the normaliser Z_ψ(x) = ∫ q̃_ψ dθ is a density of x, up to a constant.
    has_evidence: bool = False
    #: What `fit` found out that a report should say, in words; empty where there is nothing.
    remark: str = ""
    inverse_temperature: Tensor

    def __init__(self, prior: Distribution) -> None:
        super().__init__()
        for name in ("sample", "log_prob"):
            remedy = "pass a torch distribution, or what sbi's process_prior makes of yours"
            check_callable(f"prior.{name}", getattr(prior, name, None), "a method", remedy)
        self.prior = prior
        self.register_buffer("inverse_temperature", torch.tensor(1.0))

    def __deepcopy__(self, memo: dict[int, Any]) -> Proxy:
        """A copy that shares the prior, which is never changed and cannot always be copied."""
        memo[id(self.prior)] = self.prior
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        twin.__setstate__(deepcopy(state, memo))
        return twin

    def sample_prior(self, num: int) -> Tensor:
        """Draws of the prior, `(num, D)`; what a prior prints on the way is dropped."""
        with silent_prior():
            return self.prior.sample(torch.Size((num,)))

    @abstractmethod
    def log_factor(self, theta: Tensor, x: Tensor) -> Tensor:
        """f_ψ(θ, x): log-likelihood or log-ratio, up to a function of x.

        Args:
            theta: Parameters, shape `(K, B, D)`, inside the prior's support or finite at least.
            x: Observations, shape `(B, *x_shape)`.

        Returns:
            Shape `(K, B)`.
        """

    def log_prior(self, theta: Tensor) -> Tensor:
        """log p(θ) of `(*B, D)`, −∞ outside the support (where torch's own priors may raise)."""
        flat = theta.reshape(-1, theta.shape[-1])
        inside = inside_support(self.prior, flat)
        safe = torch.where(inside.unsqueeze(-1), flat, self._inside_point(flat))
        with silent_prior():
            found = self.prior.log_prob(safe)
            # torch's Uniform counts its upper bound as inside and has no density there.
            if bool((none := torch.isneginf(found) & inside).any()):
                # mutant: no-density-at-the-upper-bound
                edge = safe.detach()[none]
                inwards = torch.nextafter(edge, self._inside_point(flat).expand_as(edge))
                found = found.index_put((none,), self.prior.log_prob(inwards))
        log_prob = torch.where(inside, found, -torch.inf)
        # A prior of another precision than the simulations has log densities of that precision.
        return log_prob.reshape(theta.shape[:-1]).to(theta)

    @torch.no_grad()
    def check_prior(self, theta: Tensor) -> None:
        """Require that the prior has a density at parameters `(N, D)` of simulations.

        Raises:
            ValueError: If its log density is NaN or +∞ at some of them.
        """
        try:
            inside = inside_support(self.prior, theta)
            # A prior that declares no support has θ outside where its log density is NaN, so θ are
            # evaluated even if none is inside.
            with silent_prior():
                log_prob = self.prior.log_prob(theta[inside] if bool(inside.any()) else theta)
        except ValueError:  # torch's priors raise outside their support: no density there
            return
        wrong = torch.isnan(log_prob) | torch.isposinf(log_prob)
        if bool(wrong.any()):
            raise ValueError(
                f"prior.log_prob must be finite, or -inf outside the support, got NaN or inf at "
                f"{int(wrong.sum())} of {len(log_prob)} simulated theta; correct the "
                "prior's log_prob."
            )

    def log_potential(self, theta: Tensor, x: Tensor) -> Tensor:
        """log q̃_ψ(θ, x) = log p(θ) + γ f_ψ(θ, x), −∞ outside the prior.

        Args:
            theta: Parameters, shape `(K, B, D)`.
            x: Observations, shape `(B, *x_shape)`.

        Returns:
            Shape `(K, B)`, in nats, up to a constant that depends on x.
        """
        log_prior = self.log_prior(theta)
        inside = torch.isfinite(log_prior)
        # mutant: potential-not-tempered
        factor = self.inverse_temperature * self.log_factor_inside(theta, x, inside)
        return torch.where(inside, log_prior.nan_to_num(neginf=0.0) + factor, -torch.inf)

    def log_factor_inside(self, theta: Tensor, x: Tensor, inside: Tensor) -> Tensor:
        """f_ψ(θ, x) where θ is inside the support, and a finite number elsewhere, `(K, B)`."""
        # Networks may overflow far outside the support, and a NaN that `where` masks would still
        # reach the gradient. So they are evaluated at an inside point instead.
        safe = torch.where(inside.unsqueeze(-1), theta, self._inside_point(theta))
        return self.log_factor(safe, x)

    def _inside_point(self, like: Tensor) -> Tensor:
        """One θ of the prior's support (the same at every call), shape `(D,)`."""
        if getattr(self, "_anchor", None) is None:
            with torch.random.fork_rng(devices=[]):
                # torch.manual_seed would also seed every GPU, which is not restored.
                torch.default_generator.manual_seed(0)  # mutant: anchor-seeds-every-device
                self._anchor = self.sample_prior(1)[0].detach()
        return self._anchor.to(like)

    def fit(
        self,
        theta: Tensor,
        x: Tensor,
        train_indices: Tensor,
        val_indices: Tensor,
        on_epoch: Callable[[int, float], object] | None = None,
        max_epochs: int | None = None,
        patience: int | None = None,
    ) -> Proxy:
        """Fit to the simulations. The default is that there is nothing to fit.

        Args:
            theta: Parameters of all rounds, shape `(N, D)`.
            x: Simulations, shape `(N, *x_shape)`.
            train_indices: Pairs to fit on.
            val_indices: Held-out pairs, for early stopping and model choice.
            on_epoch: Called after every epoch with its number and held-out loss.
            max_epochs: Upper bound on the epochs of each network.
            patience: Epochs without improvement before a network's fit stops.

        Returns:
            self.
        """
        return self

    def sample_given(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs (θ̃, x̃ ∼ ℓ_ψ(·|θ̃)) at γ = 1 for θ̃ `(N, D)`; implausible pairs may be dropped."""
        raise NotImplementedError(f"{type(self).__name__} has no density of x to sample from.")

    def sample_joint(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Pairs θ̃ ∼ p(θ), x̃ ∼ ℓ_ψ(·|θ̃), at γ = 1: `(N, D)`, `(N, *x_shape)`, N ≤ num_samples."""
        raise NotImplementedError(f"{type(self).__name__} has no density of x to sample from.")


class EmpiricalPrior(Distribution):
    """Gaussian kernel density of the simulations' θ, where the user gave no prior.

    sbi's own stand-in has no density, and the reverse term needs one. The bandwidth follows Scott's
    rule on the full covariance, and all centres share it. There are at most 10,000 centres, evenly
    spaced among the θ given. Memory grows with the number of centres, not with its product with the
    number of points at which the density is evaluated.

    Args:
        theta: Parameters that the simulations were run at, shape `(N, D)`.
    """

    arg_constraints: dict = {}  # noqa: RUF012 - torch's protocol
    has_rsample = False

    def __init__(self, theta: Tensor) -> None:
        num, dim = theta.shape
        # Each parameter on its own scale, because their units may differ by any factor.
        scale, covariance = torch.ones(dim).to(theta), torch.eye(dim).to(theta)
        if num > 1:
            scale = scale_of(theta)
            covariance = torch.cov((theta / scale).T).reshape(dim, dim)
        if num > _MAX_CENTRES:
            rows = torch.linspace(0, num - 1, _MAX_CENTRES, device=theta.device).long()
            theta, num = theta[rows], _MAX_CENTRES
        covariance = num ** (-2.0 / (dim + 4)) * covariance + 1e-6 * torch.eye(dim).to(theta)
        self.centres = theta
        self.cholesky = scale.unsqueeze(1) * torch.linalg.cholesky(covariance)
        self._white = self._whitened(theta)
        super().__init__(event_shape=torch.Size((dim,)), validate_args=False)

    def _whitened(self, theta: Tensor) -> Tensor:
        """L⁻¹(θ − mean), Σ = LL', of `(N, D)`."""
        centred = (theta - self.mean).T
        return torch.linalg.solve_triangular(self.cholesky, centred, upper=False).T

    @property
    def support(self) -> constraints.Constraint:
        """All of ℝᴰ."""
        return constraints.real_vector

    @property
    def mean(self) -> Tensor:
        """Shape `(D,)`."""
        return self.centres.mean(dim=0)

    @property
    def variance(self) -> Tensor:
        """Shape `(D,)`."""
        return self.centres.var(dim=0, correction=0) + self.cholesky.pow(2).sum(dim=1)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draws of shape `(*sample_shape, D)`: a centre at random, and Gaussian noise."""
        shape = torch.Size(sample_shape)
        rows = torch.randint(len(self.centres), shape, device=self.centres.device)
        noise = torch.randn((*shape, self.centres.shape[1])).to(self.centres)
        return self.centres[rows] + noise @ self.cholesky.T

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, shape `(*B,)` for `(*B, D)`."""
        num, dim = self.centres.shape
        points = self._whitened(value.reshape(-1, dim))
        parts = []
        for part in points.split(max(1, _MAX_DISTANCES // num)):
            distances = torch.cdist(part, self._white, compute_mode="donot_use_mm_for_euclid_dist")
            parts.append(torch.logsumexp(-0.5 * distances**2, dim=1))
        log_det = self.cholesky.diagonal().log().sum()
        constant = 0.5 * dim * math.log(2 * math.pi) + log_det + math.log(num)
        return (torch.cat(parts) - constant).reshape(value.shape[:-1])

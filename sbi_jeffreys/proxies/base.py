"""The proxy's interface: an unnormalised density over θ given x, with an exact prior.

q_ψ(θ|x) ∝ q̃_ψ(θ, x) = p(θ) e^{γ f_ψ(θ, x)}, where the inverse temperature γ is 1 unless held-out
pairs call for a sharper one (`training.temperature`). Subclasses say what f_ψ is: a learned
log-likelihood (`LikelihoodProxy`), a learned log-ratio (`EnergyProxy`), or something the user hands
over (`GivenProxy`). What they share lives here: the prior's support, and the temperature.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Distribution,
    MixtureSameFamily,
    MultivariateNormal,
    constraints,
)

from sbi_jeffreys.networks.transforms import inside_support

__all__ = ["EmpiricalPrior", "Proxy"]


class Proxy(nn.Module, ABC):
    """An energy over θ given x, E_ψ(θ, x) = −log p(θ) − γ f_ψ(θ, x).

    Args:
        prior: Prior p(θ) with `log_prob` and `sample`, event shape `(D,)`.

    Attributes:
        inverse_temperature: γ, a scalar; 1 until training finds another (of proxies that
            `can_be_tempered`).
    """

    #: Whether `sample_joint` can draw pairs (θ̃, x̃) without the simulator.
    can_sample: bool = False
    #: Whether f_ψ was fitted to x, not to θ: held-out pairs may then find it too flat over θ.
    can_be_tempered: bool = False
    inverse_temperature: Tensor

    def __init__(self, prior: Distribution) -> None:
        super().__init__()
        self.prior = prior
        self.register_buffer("inverse_temperature", torch.tensor(1.0))

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
        log_prob = torch.where(inside, self.prior.log_prob(safe), -torch.inf)
        return log_prob.reshape(theta.shape[:-1])

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
        # Networks may overflow far outside the support; their value there is not used, and a NaN
        # masked by `where` would still poison the gradient. So they see an inside point instead.
        safe = torch.where(inside.unsqueeze(-1), theta, self._inside_point(theta))
        factor = self.inverse_temperature * self.log_factor(safe, x)
        return torch.where(inside, log_prior.nan_to_num(neginf=0.0) + factor, -torch.inf)

    def _inside_point(self, like: Tensor) -> Tensor:
        """One θ of the prior's support (the same at every call), shape `(D,)`."""
        if getattr(self, "_anchor", None) is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self._anchor = self.prior.sample(torch.Size((1,)))[0].detach()
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
        """Fit to the simulations; a proxy that is given rather than learned has nothing to do.

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
        """Pairs (θ̃, x̃ ∼ ℓ_ψ(·|θ̃)), γ = 1, for given θ̃ `(N, D)`; implausible ones may be dropped."""
        raise NotImplementedError(f"{type(self).__name__} has no density of x to sample from.")

    def sample_joint(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Pairs θ̃ ∼ p(θ), x̃ ∼ ℓ_ψ(·|θ̃), at γ = 1: `(N, D)`, `(N, *x_shape)`, N ≤ num_samples."""
        raise NotImplementedError(f"{type(self).__name__} has no density of x to sample from.")


class EmpiricalPrior(Distribution):
    """Gaussian kernel density of the simulations' θ, where the user gave no prior.

    sbi's own stand-in has no density; the reverse term needs one. Bandwidth: Scott's rule on the
    full covariance.

    Args:
        theta: Parameters the simulations were run at, shape `(N, D)`.
    """

    arg_constraints: dict = {}  # noqa: RUF012 - torch's protocol
    has_rsample = False

    def __init__(self, theta: Tensor) -> None:
        num, dim = theta.shape
        covariance = torch.cov(theta.T).reshape(dim, dim) if num > 1 else torch.eye(dim).to(theta)
        jitter = 1e-6 * covariance.diagonal().mean().clamp_min(1e-12)
        factor = num ** (-2.0 / (dim + 4))
        covariance = factor * covariance + jitter * torch.eye(dim).to(theta)
        self.mixture = MixtureSameFamily(
            Categorical(probs=torch.ones(num).to(theta), validate_args=False),
            MultivariateNormal(theta, covariance.expand(num, dim, dim), validate_args=False),
            validate_args=False,
        )
        super().__init__(event_shape=torch.Size((dim,)), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """All of ℝᴰ."""
        return constraints.real_vector

    @property
    def mean(self) -> Tensor:
        """Shape `(D,)`."""
        return self.mixture.mean

    @property
    def variance(self) -> Tensor:
        """Shape `(D,)`."""
        return self.mixture.variance

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draws of shape `(*sample_shape, D)`."""
        return self.mixture.sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, shape `(*B,)` for `(*B, D)`."""
        return self.mixture.log_prob(value)

"""What a benchmark task is: a prior, a simulator, a likelihood, a reference posterior for any x.

Every task of the benchmark has a tractable likelihood, which the methods under test never use. The
likelihood gives a reference posterior for *any* observation, so that methods can be compared on new
observations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.distributions import Distribution


class Task(ABC):
    """A simulator whose posterior is known.

    Subclasses set the class attributes and implement `simulate`, `log_likelihood` and
    `sample_reference`. Everything is vectorised in torch; randomness comes from torch's
    global generator, so `torch.manual_seed` makes any call reproducible.

    Attributes:
        name: Identifier on the command line.
        dim_theta: Number of parameters D.
        dim_x: Number of elements of one simulation output.
        x_shape: Its shape, where that is not `(dim_x,)`.
        prior: Prior over θ, as sbi accepts it (event shape `(D,)`).
        exact_reference: Whether `sample_reference` draws exact independent samples.
    """

    name: str
    dim_theta: int
    dim_x: int
    x_shape: tuple[int, ...] = ()
    prior: Distribution
    exact_reference: bool = False

    @abstractmethod
    def simulate(self, theta: Tensor) -> Tensor:
        """Simulate one x for each θ: `(N, D)` → `(N, dim_x)`."""

    @abstractmethod
    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """log p(x|θ) for broadcastable batches `(*B, D)`, `(*B, dim_x)` → `(*B,)`."""

    @abstractmethod
    def sample_reference(self, x: Tensor, num_samples: int) -> Tensor:
        """Samples of p(θ|x) for one observation `(dim_x,)` → `(num_samples, D)`."""

    def log_posterior_unnormalised(self, theta: Tensor, x: Tensor) -> Tensor:
        """log p(θ) + log p(x|θ), −∞ outside the prior's support; shape `(*B,)`."""
        # Priors that validate their arguments raise outside their support, so θ is replaced there.
        inside = self.prior.support.check(theta)  # pyright: ignore[reportOptionalMemberAccess]
        safe = torch.where(inside[..., None], theta, self.prior.mean.to(theta))
        log_joint = self.prior.log_prob(safe) + self.log_likelihood(safe, x)
        return torch.where(inside, log_joint, torch.full_like(log_joint, -torch.inf))

    def check_observation(self, x: Tensor) -> Tensor:
        """One observation as float64 of its shape; a leading axis of one is accepted.

        Raises:
            ValueError: If x is not one finite observation of this task.
        """
        shape = self.x_shape or (self.dim_x,)
        if tuple(x.shape) not in (shape, (1, *shape)):
            raise ValueError(
                f"x: expected one observation of {self.name}, shape {shape} or {(1, *shape)}, got "
                f"{tuple(x.shape)}; pass one row of `simulate` at a time."
            )
        if not torch.isfinite(x).all():
            raise ValueError(
                f"x: expected finite values for {self.name}, got "
                f"{int((~torch.isfinite(x)).sum())} NaN or inf; drop failed simulations first."
            )
        return x.detach().reshape(shape).to(torch.float64)

    def embedding_net(self) -> nn.Module | None:
        """A fresh, untrained embedding net for x, or None where x is a vector."""
        return None

    def modes(self, theta: Tensor, x: Tensor) -> Tensor | None:
        """Index of the posterior mode each θ `(N, D)` belongs to, or None for one mode."""
        return None

    def simulate_joint(self, num_simulations: int) -> tuple[Tensor, Tensor]:
        """Draw θ ∼ p(θ), x ∼ p(x|θ): `(N, D)`, `(N, dim_x)`."""
        theta = self.prior.sample(torch.Size((num_simulations,)))
        return theta, self.simulate(theta)

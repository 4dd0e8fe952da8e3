"""Building and using the main model: sbi's density estimators in the space they learn best in.

A network given by name is built by sbi's `posterior_nn`, with x through marginal transforms and θ
in the prior's unconstrained space. Both are exact bijections: the posterior is unchanged, and mass
outside a box or below zero is impossible by construction. A builder made by `posterior_nn(...)`,
with an embedding net perhaps, keeps its x and gets the unconstrained θ; any other is used as it
comes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from sbi.neural_nets import posterior_nn
from torch import Tensor, nn
from torch.distributions import Distribution

from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.networks.transforms import MarginalTransform, PriorTransform

__all__ = [
    "NamedBuilder",
    "UnconstrainedBuilder",
    "UnconstrainedDensityEstimator",
    "frozen",
    "reparameterised_sample",
]


class _Standardised(nn.Module):
    """Marginal transform of x followed by z-scoring: the condition as the main sees it."""

    def __init__(self, transform: MarginalTransform, x: Tensor) -> None:
        super().__init__()
        self.transform = transform
        y = transform(x)
        std = y.std(dim=0).clamp_min(1e-7) if len(y) > 1 else torch.ones_like(y[0])
        # Constants, but parameters: sbi asks an embedding net's first parameter for its device.
        self.mean = nn.Parameter(y.mean(dim=0), requires_grad=False)
        self.std = nn.Parameter(std, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.transform(x) - self.mean) / self.std


class UnconstrainedDensityEstimator(ConditionalDensityEstimator):
    """p(θ|x) of an estimator p(u|x) over u = T(θ), T the prior's map to unconstrained space.

    log p(θ|x) = log p(u|x) + log |det ∂u/∂θ|; −∞ outside the prior's support.

    Args:
        estimator: A density estimator of u given x.
        transform: θ ↔ u.
    """

    def __init__(self, estimator: ConditionalDensityEstimator, transform: PriorTransform) -> None:
        super().__init__(estimator.net, estimator.input_shape, estimator.condition_shape)
        self.estimator, self.transform = estimator, transform

    @property
    def embedding_net(self) -> nn.Module | None:
        """The wrapped estimator's embedding net."""
        return self.estimator.embedding_net

    def log_prob(self, input: Tensor, condition: Tensor, **kwargs: Any) -> Tensor:
        """log p(θ|x), shape `(sample_dim, batch_dim)`; see sbi's base class."""
        u, log_det, inside = self.transform(input)
        log_prob = self.estimator.log_prob(u, condition, **kwargs) + log_det
        return torch.where(inside, log_prob, -torch.inf)

    def loss(self, input: Tensor, condition: Tensor, **kwargs: Any) -> Tensor:
        """Negative log density of pairs, shape `(batch_dim,)`."""
        return -self.log_prob(input.unsqueeze(0), condition, **kwargs)[0]

    def sample(self, sample_shape: torch.Size, condition: Tensor, **kwargs: Any) -> Tensor:
        """Samples of θ, shape `(*sample_shape, batch_dim, D)`."""
        return self.transform.inverse(self.estimator.sample(sample_shape, condition, **kwargs))

    def sample_and_log_prob(
        self, sample_shape: torch.Size, condition: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Samples of θ, with gradient where the estimator has one, and their log densities."""
        theta = self.transform.inverse(_gradient_sample(self.estimator, condition, sample_shape))
        flat = theta.reshape(-1, *theta.shape[-2:])
        return theta, self.log_prob(flat, condition).reshape(theta.shape[:-1])


class NamedBuilder:
    """Builds the main model `posterior_nn(model)` in transformed spaces; picklable.

    A mixture density network ("mdn") leaves θ as it is: sbi's closed-form loss of later rounds is
    for a mixture of Gaussians over θ itself, and that loss is what an mdn is chosen for.

    Args:
        model: Name of an sbi density estimator.
        prior: Prior, for its unconstrained space; None leaves θ as it is.
    """

    def __init__(self, model: str, prior: Distribution | None = None) -> None:
        self.model, self.prior = model, prior

    def __call__(self, theta: Tensor, x: Tensor) -> ConditionalDensityEstimator:
        """Build from training simulations θ `(N, D)`, x `(N, *x_shape)`."""
        kwargs: dict[str, Any] = {}
        if x.ndim == 2 and bool(torch.isfinite(x).all()) and bool((x != x[:1]).any()):
            transform = MarginalTransform.fit(x)
            if not transform.is_identity:
                kwargs = {"embedding_net": _Standardised(transform, x), "z_score_x": "none"}
        builder = posterior_nn(model=self.model, **kwargs)
        if self.prior is None or self.model == "mdn":
            return builder(theta, x)
        return UnconstrainedBuilder(builder, self.prior)(theta, x)


class UnconstrainedBuilder:
    """A builder whose network models θ in the prior's unconstrained space, where that differs.

    Args:
        builder: Builds an estimator of u given x.
        prior: The prior of θ.
    """

    def __init__(self, builder: Callable[[Tensor, Tensor], Any], prior: Distribution) -> None:
        self.builder, self.prior = builder, prior

    @classmethod
    def wrap(cls, builder: Any, prior: Distribution) -> Any:
        """`builder` in unconstrained space if sbi's `posterior_nn` made it, else as it is.

        As it is also where θ was asked to be transformed or not scaled at all, and for a mixture
        density network (see `NamedBuilder`).
        """
        if getattr(builder, "__module__", "") != posterior_nn.__module__:
            return builder
        made = inspect.getclosurevars(builder).nonlocals
        kwargs = made.get("builder_kwargs", {})
        scaled = kwargs.get("z_score_x") in ("independent", "structured", True)
        if made.get("model", "mdn").startswith("mdn") or not scaled:
            return builder
        return cls(builder, prior)

    def __call__(self, theta: Tensor, x: Tensor) -> ConditionalDensityEstimator:
        """Build from training simulations θ `(N, D)`, x `(N, *x_shape)`."""
        transform = PriorTransform.fit(self.prior)
        if transform is None:
            return self.builder(theta, x)
        return UnconstrainedDensityEstimator(self.builder(transform(theta)[0], x), transform)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Evaluate `module` at constant parameters; gradients flow through its inputs only."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


def _gradient_sample(
    estimator: ConditionalDensityEstimator, x: Tensor, shape: torch.Size
) -> Tensor:
    """Samples that carry a gradient if the estimator has any way to give one."""
    theta = estimator.sample(shape, x)
    if torch.is_grad_enabled() and not theta.requires_grad:
        # zuko's `sample` has no gradient, its `sample_and_log_prob` has. nflows' has the first and
        # pairs samples with the wrong conditions in the second: hence this order.
        with suppress(NotImplementedError):
            theta, _ = estimator.sample_and_log_prob(shape, x)
    return theta


def reparameterised_sample(
    main: ConditionalDensityEstimator, x: Tensor, num_samples: int
) -> Tensor:
    """Samples θ_φ ∼ p_φ(·|x) with gradient to φ, shape `(num_samples, B, D)`.

    Raises:
        ValueError: If the estimator cannot sample with gradients.
    """
    theta = _gradient_sample(main, x, torch.Size((num_samples,)))
    if not theta.requires_grad:
        raise ValueError(
            f"reverse_estimator='path' needs a density estimator that samples with gradients; "
            f"{type(main).__name__} does not. Use reverse_estimator='vargrad'."
        )
    return theta

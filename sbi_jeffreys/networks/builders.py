"""Building the main model: an sbi density estimator over transformed parameters and data.

θ is mapped to the prior's unconstrained space and a vector x through marginal transforms. Both maps
are exact bijections: the posterior is unchanged, and no mass lies outside a box or below zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from sbi.neural_nets import posterior_nn
from torch import Tensor, nn
from torch.distributions import Distribution

from sbi_jeffreys._checks import check_bool, check_choice, check_instance, warn
from sbi_jeffreys._sbi import ConditionalDensityEstimator, model_builders
from sbi_jeffreys.networks.configs import check_trainable, is_config, own_setting
from sbi_jeffreys.networks.fast_layers import with_fast_layers
from sbi_jeffreys.networks.prior_space import (
    PriorTransform,
    has_no_volume,
    hides_bounds,
    is_bounded,
)
from sbi_jeffreys.networks.standardised import WIDE, StandardisedInput
from sbi_jeffreys.networks.transforms import TINY, MarginalTransform, scale_of

__all__ = [
    "MainBuilder",
    "UnconstrainedDensityEstimator",
    "main_builder",
]

_MODELS = tuple(sorted(set(model_builders) - {"mnle", "tabpfn"}))
# Models of θ as it is: sbi's closed-form loss of later rounds needs a mixture of Gaussians over θ
# itself, a circular spline flow is periodic and so no density in unconstrained space, and mixed
# estimation looks for discrete columns of θ.
# mutant: periodic-flows-unconstrained
_THETA_AS_IT_IS = ("mdn", "zukoncsf", "mnpe")
_EDGE_SHARE = 1e-4  # share of parameters that rounding may put on the edge

Build = Callable[[Tensor, Tensor], ConditionalDensityEstimator]


class UnconstrainedDensityEstimator(ConditionalDensityEstimator):
    """p(θ|x) of an estimator p(u|x) over u = T(θ), T the prior's map to unconstrained space.

    log p(θ|x) = log p(u|x) + log |det ∂u/∂θ|; −∞ outside the prior's support. The methods are those
    of sbi's base class.

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

    def inverse_transform(self, input: Tensor, condition: Tensor) -> Tensor:
        """The noise that the flow maps to θ, as sbi's `LC2ST_NF` asks for it, shape of θ."""
        # mutant: noise-of-theta-itself
        u = self.transform(input)[0]
        if not hasattr(self.net, "transform_to_noise"):  # a flow of zuko
            return self.estimator.inverse_transform(u, condition)  # type: ignore[operator]
        # Not by the method of sbi 0.27, which does not embed x, and so does not z-score x either.
        x = condition.expand(len(u), *self.condition_shape)
        # mutant: noise-of-raw-x
        return self.net.transform_to_noise(u, x)  # type: ignore[operator]

    def sample(self, sample_shape: torch.Size, condition: Tensor, **kwargs: Any) -> Tensor:
        """Samples of θ, shape `(*sample_shape, batch_dim, D)`."""
        return self.transform.inverse(self.estimator.sample(sample_shape, condition, **kwargs))

    def sample_and_log_prob(
        self, sample_shape: torch.Size, condition: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Samples of θ and their log densities."""
        theta = self.sample(sample_shape, condition, **kwargs)
        flat = theta.reshape(-1, *theta.shape[-2:])
        return theta, self.log_prob(flat, condition).reshape(theta.shape[:-1])


class MainBuilder:
    """Builds the main model p_φ(θ|x), with an embedding net where x needs one; picklable.

    Use it for `NPE_Jeffreys` in place of sbi's `posterior_nn(...)`, which has no access to the
    prior. The trainer passes its prior to the builder, so that θ is modelled in unconstrained space
    and no mass leaks out of the prior's support. "mdn", "zuko_ncsf" and "mnpe" model θ as it is:
    sbi's closed-form loss of later rounds needs a mixture of Gaussians over θ itself, a circular
    flow is periodic, and mixed estimation looks for discrete columns of θ.

    Args:
        model: Name of an sbi density estimator ("nsf", "maf", "mdn", "zuko_nsf", …; in any case),
            or one of sbi's typed configs.
        embedding_net: Maps x `(B, *x_shape)` to summaries `(B, S)`; None for a vector x. A copy
            of it is trained. With a config, set the config's own `embedding_net` instead.
        marginal_transforms: Whether θ is transformed, and a vector x as well unless you set an
            embedding net or a z-scoring of x. A config sets a z-scoring of x if it has another one
            than its default.
        **settings: Further arguments of sbi's `posterior_nn`, such as `hidden_features=100`. For a
            config, set them in the config.

    Raises:
        TypeError: If `model` is neither a name nor a config of a density that is trained, or
            `embedding_net` is no module.
        ValueError: If sbi has no model of this name, or a config comes with other arguments.

    Example:
        >>> import torch
        >>> from sbi_jeffreys import MainBuilder, NPE_Jeffreys
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8))
        >>> inference = NPE_Jeffreys(density_estimator=MainBuilder("maf", embedding_net=net))
    """

    def __init__(
        self,
        model: Any = "nsf",
        embedding_net: nn.Module | None = None,
        marginal_transforms: bool = True,
        **settings: Any,
    ) -> None:
        if embedding_net is not None:
            check_instance("embedding_net", embedding_net, nn.Module)
        check_bool("marginal_transforms", marginal_transforms)
        check_trainable("model", model)
        beside = ["embedding_net"] * (embedding_net is not None) + list(settings)
        if isinstance(model, str):
            model = check_choice("density_estimator", model.lower(), _MODELS)
        elif not is_config(model):
            raise TypeError(
                f"model must be a name such as 'nsf' or one of sbi's model configs, got "
                f"{type(model).__name__}; pass any other builder to NPE_Jeffreys itself."
            )
        elif beside:
            raise ValueError(
                f"model is a {type(model).__name__}, which has settings of its own, but got "
                f"{', '.join(beside)} beside it; set them in the config."
            )
        self.model = model
        self.embedding_net, self.settings = embedding_net, settings
        self.marginal_transforms = marginal_transforms
        self.prior: Distribution | None = None

    def with_prior(self, prior: Distribution | None) -> MainBuilder:
        """A copy that builds in the unconstrained space of this prior; None leaves θ as it is."""
        twin = MainBuilder.__new__(MainBuilder)
        vars(twin).update(vars(self) | {"prior": prior})
        return twin

    def avoiding_edge(self, theta: Tensor) -> MainBuilder:
        """This builder, or one that models θ as it is if parameters lie on the support's edge.

        In unconstrained space the edge is at infinity, and a single pair there would dominate the
        loss.

        Args:
            theta: All simulated parameters, `(N, D)`.

        Warns:
            JeffreysWarning: If θ is modelled as it is for that reason.
        """
        transform = self._prior_transform()
        num = 0 if transform is None else int(transform.on_edge(theta).sum())
        if num <= _EDGE_SHARE * len(theta):  # mutant: edge-not-seen
            return self
        warn(
            f"{num} of {len(theta)} parameters lie on the edge of the prior's support (clamped, or "
            "on a grid): the main models theta as it is and can put mass outside the support, "
            "which sampling then rejects. Draw parameters from the prior to avoid this.",
        )
        return self.with_prior(None)

    def _prior_transform(self) -> PriorTransform | None:
        """The map to the space in which θ is modelled; None for θ as it is, as in a mixture."""
        name = self.model if isinstance(self.model, str) else type(self.model).__name__
        as_it_is = name.lower().removesuffix("config").replace("_", "") in _THETA_AS_IT_IS
        # sbi can transform θ by itself; a second transform would make the density wrong.
        z_score = self.settings.get("z_score_theta", getattr(self.model, "z_score_input", None))
        by_sbi = z_score == "transform_to_unconstrained"  # mutant: theta-transformed-twice
        if as_it_is or by_sbi or not self.marginal_transforms:
            return None
        return PriorTransform.fit(self.prior)

    def __call__(self, theta: Tensor, x: Tensor) -> ConditionalDensityEstimator:
        """Build from training simulations θ `(N, D)`, x `(N, *x_shape)`."""
        build, transform = self._build(x), self._prior_transform()
        if transform is None:
            return with_fast_layers(build(theta, x))
        estimator = with_fast_layers(build(transform(theta)[0], x))
        return UnconstrainedDensityEstimator(estimator, transform)

    def _build(self, x: Tensor) -> Build:
        """sbi's builder, with a vector x transformed and z-scored where no net embeds it."""
        embedding = None
        if self.marginal_transforms and x.ndim == 2 and not self._embeds():
            with suppress(ValueError):  # not finite, or constant: sbi's own z-scoring copes
                transform = MarginalTransform.fit(x)
                # Of wide x, outputs may be left out later. sbi's own z-scoring takes a standard
                # deviation below 1e-7 for zero.
                tiny = bool((scale_of(x) < TINY).any())  # mutant: small-units-unseen
                if x.shape[1] > WIDE or tiny or not transform.is_identity:
                    embedding = StandardisedInput(transform, x)
        # Copies, so that a second network does not start from the first one's trained embedding.
        if not isinstance(self.model, str):
            config = deepcopy(self.model)
            if embedding is not None:
                settings = {"embedding_net": embedding, "z_score_condition": "none"}
                config = dataclasses.replace(config, **settings)
            return lambda theta, x: config.build(batch_input=theta, batch_condition=x)
        settings = dict(self.settings)
        if embedding is not None:
            settings |= {"embedding_net": embedding, "z_score_x": "none"}
        elif self.embedding_net is not None:
            settings["embedding_net"] = _with_parameter(deepcopy(self.embedding_net))
        return posterior_nn(self.model, **settings)

    def _embeds(self) -> bool:
        """Whether the user chose an embedding net or a z-scoring of x."""
        if isinstance(self.model, str):
            return self.embedding_net is not None or "z_score_x" in self.settings
        net = getattr(self.model, "embedding_net", None)
        embeds = net is not None and not isinstance(net, nn.Identity)
        # mutant: z-score-of-config-overridden
        return embeds or own_setting(self.model, "z_score_condition") is not None


def _with_parameter(net: nn.Module) -> nn.Module:
    """The net, with a fixed parameter if it has none: sbi takes the device from the first one."""
    if not any(True for _ in net.parameters()):
        net.register_parameter("fixed", nn.Parameter(torch.zeros(1), requires_grad=False))
    return net


def main_builder(
    given: Any, prior: Distribution | None, marginal_transforms: bool
) -> Callable[..., Any]:
    """The builder of the main: a `MainBuilder` for a name, a config or None, otherwise `given`.

    Raises:
        ValueError: If the prior's draws lie in a hyperplane.

    Warns:
        JeffreysWarning: If the prior is bounded and θ is not modelled in unconstrained space.
    """
    if given is None or isinstance(given, str) or is_config(given):
        name = "nsf" if given is None else given
        given = MainBuilder(name, marginal_transforms=marginal_transforms)
    bounded = is_bounded(prior)
    if not isinstance(given, MainBuilder):
        if bounded:
            warn(
                "density_estimator is a builder of your own and is used as it is: unless it "
                "transforms theta itself, the posterior can put mass outside the prior's support, "
                "which sampling then rejects. "
                "MainBuilder(name, embedding_net=...) of sbi_jeffreys builds the same networks "
                "inside the support.",
            )
        return given
    odd = bounded and PriorTransform.fit(prior) is None
    if odd and prior is not None and has_no_volume(prior):
        raise ValueError(
            f"prior ({type(prior).__name__}) must have a density over all of its parameters, but "
            "its draws lie in a hyperplane, as numbers do that add up to one; leave out a "
            "parameter that the others determine, and compute it in the simulator."
        )
    if odd and given.marginal_transforms:
        warn(
            f"The support of the prior ({type(prior).__name__}) has no unconstrained space that "
            "torch knows: the main models theta as it is and can put mass outside it, which "
            "sampling then rejects. If you can, write the prior in terms of parameters with a box "
            "or half-line support.",
        )
    if given.marginal_transforms and hides_bounds(prior):
        warn(
            f"The prior ({getattr(prior, 'custom_prior', prior).__class__.__name__}) declares no "
            "bounds, but has no density far from its draws: the main models theta as it is and can "
            "put mass outside the prior. Pass the bounds, process_prior(prior, "
            "custom_prior_wrapper_kwargs=dict(lower_bound=..., upper_bound=...)).",
        )
    return given.with_prior(prior)

"""Proxies: energies over θ given x that stand in for the simulator's unknown posterior."""

from __future__ import annotations

from copy import deepcopy
from pickle import PicklingError
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from sbi_jeffreys._checks import warn
from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.networks.embedding import summaries_of
from sbi_jeffreys.networks.prior_space import inside_support
from sbi_jeffreys.networks.standardised import StandardisedInput
from sbi_jeffreys.networks.transforms import varying
from sbi_jeffreys.proxies.base import EmpiricalPrior, Proxy
from sbi_jeffreys.proxies.energy import EnergyProxy
from sbi_jeffreys.proxies.energy_net import EnergyConfig
from sbi_jeffreys.proxies.experts import (
    FlowExpert,
    NeuralRegressionExpert,
    RegressionExpert,
)
from sbi_jeffreys.proxies.given import GivenProxy
from sbi_jeffreys.proxies.likelihood import LikelihoodProxy
from sbi_jeffreys.proxies.pooled import PooledProxy
from sbi_jeffreys.proxies.summary import SummaryLikelihoodProxy

if TYPE_CHECKING:
    from sbi_jeffreys.options import JeffreysOptions

__all__ = [
    "EmpiricalPrior",
    "EnergyConfig",
    "EnergyProxy",
    "FlowExpert",
    "GivenProxy",
    "LikelihoodProxy",
    "NeuralRegressionExpert",
    "PooledProxy",
    "Proxy",
    "RegressionExpert",
    "build_proxy",
    "hand_back_embedding",
    "hand_over_summaries",
    "leave_out_uninformative",
]


def build_proxy(
    prior: Distribution, main: ConditionalDensityEstimator, x: Tensor, options: JeffreysOptions
) -> tuple[Proxy | None, str]:
    """The proxy that `options.proxy` asks for and the reason for the choice.

    Args:
        prior: Prior with a density.
        main: The main after stage 0; a trainable embedding net means structured x.
        x: Simulations `(N, *x_shape)`.
        options: `proxy` and the settings of each kind.

    Returns:
        The proxy, not fitted yet, or None where there is none for this x; and the reason. A proxy
        that was passed and has something to fit is copied.

    Raises:
        ValueError: If a likelihood proxy is asked for where x has no density.
    """
    if isinstance(options.proxy, Proxy):
        _compare_priors(options.proxy.prior, prior)  # mutant: priors-not-compared
        return _own(options.proxy), f"given: {type(options.proxy).__name__}"
    summary = main.embedding_net
    if options.proxy == "auto" and summary is not None and _is_fixed(summary):
        if _same_for_all(summaries_of(summary, x)):  # mutant: constant-summaries-modelled
            return None, (
                "the embedding net gives the same summaries of every x, which carry no information "
                "on theta: use another net"
            )
        proxy = SummaryLikelihoodProxy(
            prior, summary, options.experts, options.proxy_fit, options.proxy_folds
        )
        return proxy, "likelihood: the main's embedding net is fixed"
    obstacle = _no_density(x)
    if obstacle == _CONSTANT:
        return None, "x is constant and carries no information on theta: simulate other outputs"
    if options.proxy == "likelihood" and obstacle is not None:
        raise ValueError(
            f"proxy='likelihood' needs a density of x, but {obstacle}; use proxy='auto'."
        )
    reason = "asked for"
    if options.proxy == "auto":
        obstacle = obstacle or ("the main embeds x" if _embeds(main) else None)
        reason = obstacle or "vector x"
    if options.proxy == "auto" and _embeds(main):
        likelihood = options.experts, options.proxy_fit, options.proxy_folds
        proxy = PooledProxy(prior, options.energy, None, *likelihood)  # mutant: pooled-folds-lost
        return proxy, f"energy and likelihood of summaries: {reason}"
    if options.proxy == "energy" or (options.proxy == "auto" and obstacle is not None):
        return EnergyProxy(prior, options.energy), f"energy: {reason}"
    proxy = LikelihoodProxy(prior, options.experts, options.proxy_fit, options.proxy_folds)
    return proxy, f"likelihood: {reason}"


def _own(proxy: Proxy) -> Proxy:
    """A copy of a proxy that is about to be fitted: other trainers may have the same options.

    A proxy with nothing to fit is shared, and so is one that cannot be copied.
    """
    if isinstance(proxy, GivenProxy):
        return proxy
    try:
        return deepcopy(proxy)  # mutant: given-proxy-fitted-in-place
    except (TypeError, RuntimeError, AttributeError, PicklingError):
        return proxy  # such as one that holds a module, a lock, or a tensor with a graph


_CONSTANT = "x is constant"
_COMPARED = 1_000  # draws at which two priors are compared
_SAME = 0.01  # nats by which their log densities may differ


@torch.no_grad()
def _compare_priors(given: Distribution, prior: Distribution) -> None:
    """Warn where the prior of a given proxy is not the trainer's, up to a constant factor."""
    if given is prior or isinstance(prior, EmpiricalPrior):  # then the user gave none to compare
        return
    with torch.random.fork_rng(devices=[]):
        theirs, ours = (p.sample(torch.Size((_COMPARED,))) for p in (given, prior))
    wider = int((~inside_support(prior, theirs)).sum())
    narrower = int((~inside_support(given, ours)).sum())
    if wider or narrower:
        what = (
            f"is not the trainer's: {wider} of {_COMPARED} draws of it are outside the trainer's, "
            f"and {narrower} of {_COMPARED} draws of the trainer's are outside of it"
        )
    else:
        gap = given.log_prob(ours) - prior.log_prob(ours)
        if float((gap - gap.median()).abs().max()) < _SAME:
            return
        what = (
            "is not the trainer's: their log densities differ by "
            f"{float(gap.min()):.2g} to {float(gap.max()):.2g} nats"
        )
    warn(
        f"The prior of the given proxy {what}; give the proxy the prior that NPE_Jeffreys has.",
    )


def _same_for_all(summaries: Tensor) -> bool:
    """Whether summaries `(N, S)` are finite and constant."""
    return bool(torch.isfinite(summaries).all()) and not bool(varying(summaries).any())


def _no_density(x: Tensor) -> str | None:
    """Why no likelihood net can model x, or None if one can."""
    if bool((x == x[:1]).all()):
        return _CONSTANT
    if x.ndim != 2:
        return f"x has shape {tuple(x.shape[1:])} per simulation, not a vector"
    if not bool(torch.isfinite(x).all()):
        return "x contains NaN or inf"
    if not bool(varying(x).any()):
        return _CONSTANT
    return None


def _embeds(main: ConditionalDensityEstimator) -> bool:
    """Whether the main has a trainable embedding net of x, other than `StandardisedInput`."""
    net = main.embedding_net
    trainable = net is not None and any(p.requires_grad for p in net.parameters())
    return trainable and not _standardised(main)


def _is_fixed(net: nn.Module | None) -> bool:
    """Whether there is an embedding net of the user's without trainable parameters.

    Neither sbi's own standardisation, which has no parameters at all, nor a `StandardisedInput` of
    this package counts as one.
    """
    ours = net is None or any(isinstance(part, StandardisedInput) for part in net.modules())
    parameters = [] if net is None or ours else list(net.parameters())  # mutant: own-scale-is-fixed
    return len(parameters) > 0 and not any(p.requires_grad for p in parameters)


def hand_back_embedding(proxy: Proxy, main: ConditionalDensityEstimator) -> None:
    """Load the weights of an embedding net that an energy has trained further into the main's.

    The energy starts from a copy of that net, and its fit improves the summaries of x, whereas the
    symmetric stage, which draws new θ but no new x, does not.
    """
    if isinstance(proxy, EnergyProxy) and proxy.net is not None and _embeds(main):
        trained = proxy.net.embedding.state_dict()
        embedding = main.embedding_net
        if embedding is not None and trained.keys() == embedding.state_dict().keys():
            embedding.load_state_dict(trained)


def leave_out_uninformative(proxy: Proxy, main: ConditionalDensityEstimator) -> None:
    """Leave those outputs out of the main's input that the proxy found independent of θ.

    Plain NPE has fitted some of their noise, and the symmetric stage would take long to undo that,
    because draws of the proxy contain the same noise.
    """
    if isinstance(proxy, LikelihoodProxy) and proxy.can_sample:
        for part in _standardised(main):
            part.use_only(proxy.columns)  # mutant: main-sees-distractors


def hand_over_summaries(proxy: Proxy, main: ConditionalDensityEstimator, x: Tensor) -> bool:
    """Give the main the proxy's linear summaries of x as its only input, where that is possible.

    With hundreds of outputs, plain NPE fits the noise of the simulations that it has seen. What the
    main has learned is of no use for its new input: it has to be fitted again.

    Args:
        proxy: A fitted proxy.
        main: The main; it must have a `StandardisedInput` that transforms x as the proxy does.
        x: Simulations `(N, dim_x)` by which the summaries are standardised.

    Returns:
        Whether the main gets summaries now.
    """
    if not isinstance(proxy, LikelihoodProxy) or proxy.compression is None:
        return False
    transform, summaries = proxy.compression.transform, proxy.compression.summaries
    for part in _standardised(main):
        # Where outputs were left out as uninformative, the transforms differ.
        if part.transforms_as(transform):
            part.use_summaries(summaries, x)
            return True
    return False


def _standardised(main: ConditionalDensityEstimator) -> list[StandardisedInput]:
    net = main.embedding_net
    parts = net.modules() if isinstance(net, nn.Module) else ()
    return [part for part in parts if isinstance(part, StandardisedInput)]

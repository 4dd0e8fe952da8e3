"""Proxies: energies over θ given x that stand in for the simulator's unknown posterior."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Distribution

from sbi_jeffreys.proxies.base import EmpiricalPrior, Proxy
from sbi_jeffreys.proxies.likelihood import LikelihoodProxy, MemberSpec

if TYPE_CHECKING:
    from sbi_jeffreys.options import JeffreysOptions

__all__ = ["EmpiricalPrior", "LikelihoodProxy", "MemberSpec", "Proxy", "build_proxy"]


def build_proxy(
    prior: Distribution, theta: Tensor, x: Tensor, options: JeffreysOptions
) -> tuple[Proxy | None, str]:
    """The proxy that `options.proxy` asks for and the reason for the choice.

    Args:
        prior: Prior with a density.
        theta: Parameters `(N, D)`.
        x: Simulations `(N, *x_shape)`.
        options: `proxy` and, for the likelihood proxy, `members` and `proxy_fit`.

    Returns:
        The proxy, not fitted yet, or None where there is none for this x, and why.
    """
    if isinstance(options.proxy, Proxy):
        return options.proxy, f"given: {type(options.proxy).__name__}"
    obstacle = _no_density(x)
    if obstacle is None:
        return LikelihoodProxy(prior, options.members, options.proxy_fit), "likelihood: vector x"
    if options.proxy == "likelihood":
        raise ValueError(
            f"proxy='likelihood' needs a density of x, but {obstacle}; use proxy='auto'."
        )
    return None, f"no proxy for this x: {obstacle}"


def _no_density(x: Tensor) -> str | None:
    """Why no likelihood net can model x, or None if one can."""
    if x.ndim != 2:
        return f"x has shape {tuple(x.shape[1:])} per simulation, not a vector"
    if not bool(torch.isfinite(x).all()):
        return "x contains NaN or inf"
    if not bool((x != x[:1]).any()):
        return "x is constant"
    return None

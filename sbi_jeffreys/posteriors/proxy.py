r"""The proxy as a posterior of its own: sbi's samplers on log q̃_ψ(θ, x_o).

The proxy is an unnormalised density, so it is sampled by MCMC, by importance sampling with the main
as the proposal, or by rejection from the prior.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from typing import Any, Literal

import torch
from sbi.inference.posteriors import ImportanceSamplingPosterior, MCMCPosterior, RejectionPosterior
from torch import Tensor

from sbi_jeffreys._checks import check_choice, check_instance
from sbi_jeffreys._sbi import (
    BasePotential,
    ConditionalDensityEstimator,
    ImportanceSamplingPosteriorParameters,
    MCMCPosteriorParameters,
    PosteriorParameters,
    RejectionPosteriorParameters,
)
from sbi_jeffreys.posteriors.direct import transform_of
from sbi_jeffreys.proxies.base import Proxy

__all__ = ["PooledPotential", "ProxyPosterior", "ProxyPotential", "SampleWith", "proxy_posterior"]

SampleWith = Literal["mcmc", "importance", "rejection"]
ProxyPosterior = MCMCPosterior | ImportanceSamplingPosterior | RejectionPosterior

_PARAMETERS: dict[str, type[PosteriorParameters]] = {
    "mcmc": MCMCPosteriorParameters,
    "importance": ImportanceSamplingPosteriorParameters,
    "rejection": RejectionPosteriorParameters,
}


class ProxyPotential(BasePotential):
    """log q̃_ψ(θ, x_o) as a potential function for sbi's samplers; picklable.

    Several rows of x_o are independent observations of one θ, whose log factors are added under one
    prior, unless `set_x(x, x_is_iid=False)` pairs the rows with as many θ.

    Args:
        proxy: A fitted proxy.
        x_shape: Shape of one observation, without batch dimension.
        device: Where to evaluate it.

    Raises:
        TypeError: If `proxy` is no Proxy.
    """

    def __init__(self, proxy: Proxy, x_shape: torch.Size, device: str = "cpu") -> None:
        check_instance("proxy", proxy, Proxy, "pass inference.proxy or a GivenProxy")
        self.proxy, self.x_shape = proxy, x_shape
        super().__init__(proxy.prior, None, device)

    def to(self, device: str | torch.device) -> ProxyPotential:
        """Move proxy, prior and observation to a device."""
        super().to(device)
        self.proxy.to(device)
        if self.prior is not None:
            self.proxy.prior = self.prior
        return self

    def __call__(self, theta: Tensor, track_gradients: bool = True) -> Tensor:
        """log q̃_ψ of θ `(N, D)` at the observation, `(N,)`, −∞ outside the prior."""
        x = self.x_o.reshape(-1, *self.x_shape)
        theta = torch.atleast_2d(torch.as_tensor(theta)).to(self.device)
        with torch.set_grad_enabled(track_gradients):
            if len(x) == 1:
                return self.proxy.log_potential(theta.unsqueeze(1), x)[:, 0]
            if not self.x_is_iid:
                return self.proxy.log_potential(theta.unsqueeze(0), x)[0]
            repeated = theta.unsqueeze(1).expand(-1, len(x), -1)
            potential = self.proxy.log_potential(repeated, x).sum(1)
            log_prior = self.proxy.log_prior(theta)
            inside = torch.isfinite(log_prior)
            rest = (len(x) - 1) * torch.where(inside, log_prior, 0.0)
            return torch.where(inside, potential - rest, -torch.inf)


def _one_observation(potential: ProxyPotential) -> Tensor:
    """The potential's observation, `(1, *x_shape)`; several are refused."""
    x = potential.x_o.reshape(-1, *potential.x_shape)
    if len(x) != 1:
        raise ValueError(
            f"x must be one observation, got {len(x)}; the main is a posterior given one "
            "observation. Use build_proxy_posterior(sample_with='mcmc') for several independent "
            "ones."
        )
    return x


class PooledPotential(ProxyPotential):
    """The log target of a `CorrectedPosterior` at one observation.

    Args:
        main: The main model p_φ(θ|x).
        proxy: A fitted proxy.
        log_target: Returns the log target `(K, B)` for θ `(K, B, D)`, x `(B, *x_shape)` and
            log p_φ `(K, B)`.
        device: Where to evaluate it.
    """

    def __init__(
        self,
        main: ConditionalDensityEstimator,
        proxy: Proxy,
        log_target: Callable[[Tensor, Tensor, Tensor], Tensor],
        device: str = "cpu",
    ) -> None:
        super().__init__(proxy, main.condition_shape, device)
        self.main, self.log_target = main, log_target

    def __call__(self, theta: Tensor, track_gradients: bool = True) -> Tensor:
        """The log target of θ `(N, D)` at the observation, `(N,)`, −∞ outside the prior."""
        x = _one_observation(self)
        theta = torch.atleast_2d(torch.as_tensor(theta)).to(self.device).unsqueeze(1)
        with torch.set_grad_enabled(track_gradients):
            return self.log_target(theta, x, self.main.log_prob(theta, x))[:, 0]


class _MainProposal:
    """The main as a proposal at the potential's x_o, since sbi sets x_o on the potential alone."""

    def __init__(self, main: ConditionalDensityEstimator, potential: ProxyPotential) -> None:
        self.main, self.potential = main, potential

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws `(*sample_shape, D)` of the main; of the prior if no observation is set yet."""
        shape = torch.Size(sample_shape)
        if self.potential.return_x_o() is None:  # sbi tests its transforms on a few draws
            return self.potential.proxy.prior.sample(shape)
        theta = self.main.sample(torch.Size((shape.numel(),)), _one_observation(self.potential))
        return theta[:, 0].reshape(*shape, -1)

    def log_prob(self, theta: Tensor) -> Tensor:
        """log p_φ(θ|x_o) of θ `(N, D)`, shape `(N,)`."""
        return self.main.log_prob(theta.unsqueeze(1), _one_observation(self.potential))[:, 0]

    def __getattr__(self, name: str) -> Any:
        # sbi builds its unconstraining transform from these; the main's support is the prior's.
        if name in ("support", "mean", "stddev"):
            return getattr(self.potential.prior, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")

    def to(self, device: str | torch.device) -> None:
        self.main.to(device)


def proxy_posterior(
    main: ConditionalDensityEstimator,
    proxy: Proxy,
    sample_with: SampleWith,
    parameters: PosteriorParameters | None,
    device: str,
) -> ProxyPosterior:
    """sbi's posterior of the proxy; the networks are copied.

    Args:
        main: The main model, the proposal of importance sampling.
        proxy: A fitted proxy; MCMC chains start at draws of its prior, which rejection sampling
            also proposes from.
        sample_with: "mcmc", "importance" or "rejection".
        parameters: sbi's parameters of that posterior; None for its defaults.
        device: Device of the posterior.

    Raises:
        TypeError, ValueError: If an argument is of another type, or `sample_with` is unknown.
    """
    check_instance("main", main, ConditionalDensityEstimator, "pass what train() returned")
    check_instance("proxy", proxy, Proxy, "pass inference.proxy or a GivenProxy")
    if sample_with == "direct":
        raise ValueError(
            f"sample_with must be one of {tuple(_PARAMETERS)}, got 'direct': the proxy's density "
            "is unnormalised and cannot be drawn from directly; use 'importance'."
        )
    expected = _PARAMETERS[check_choice("sample_with", sample_with, tuple(_PARAMETERS))]
    parameters = expected() if parameters is None else parameters
    remedy = f"sample_with={sample_with!r} needs {expected.__name__}(...)"
    check_instance("posterior_parameters", parameters, expected, remedy)
    main, proxy = deepcopy(main), deepcopy(proxy)
    prior = proxy.prior
    potential = ProxyPotential(proxy, main.condition_shape, device)
    kwargs = {"theta_transform": transform_of(prior, device), "device": device}
    kwargs |= {k: v for k, v in asdict(parameters).items() if v is not None}
    if sample_with == "importance":
        proposal = _MainProposal(main, potential)
        return ImportanceSamplingPosterior(potential, proposal=proposal, **kwargs)
    posterior = MCMCPosterior if sample_with == "mcmc" else RejectionPosterior
    return posterior(potential, proposal=prior, **kwargs)

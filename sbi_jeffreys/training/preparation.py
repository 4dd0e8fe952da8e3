"""From a plain NPE to the symmetric stage: fit the proxy, weigh it, draw its pool."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributions import Distribution
from tqdm.auto import tqdm

from sbi_jeffreys._sbi import ConditionalDensityEstimator, ImproperEmpirical
from sbi_jeffreys.objective import truncated_log_weights
from sbi_jeffreys.options import JeffreysOptions
from sbi_jeffreys.proxies import EmpiricalPrior, EnergyProxy, Proxy, build_proxy
from sbi_jeffreys.training.held_out import HeldOut
from sbi_jeffreys.training.multipliers import trust

__all__ = ["Prepared", "Simulations", "prepare"]

_MIN_POOL = 0.05  # share of the proxy's draws that must be plausible


@dataclass(frozen=True)
class Simulations:
    """All simulations of the rounds in use, on the training device, and how they are split.

    Attributes:
        theta: Parameters `(N, D)`.
        x: Simulations `(N, *x_shape)`.
        train: Indices of training pairs.
        val: Indices of held-out pairs.
        round_: Index of the latest round.
    """

    theta: Tensor
    x: Tensor
    train: Tensor
    val: Tensor
    round_: int


@dataclass(frozen=True)
class Prepared:
    """A fitted proxy and what was found out about it.

    Attributes:
        proxy: None where there is none for this x.
        note: Which proxy, why, and what speaks against it.
        usable: Whether the symmetric stage should run.
        proxy_nll: Held-out P_val, nats per pair.
        main_nll: Held-out value of the main the proxy was compared with.
        trust: t in [0, 1].
        pool: θ (or None) and x for the symmetric stage.
        pool_weights: How often each of them is used, in proportion.
    """

    proxy: Proxy | None
    note: str
    usable: bool = False
    proxy_nll: float = float("inf")
    main_nll: float = float("inf")
    trust: float = 0.0
    pool: tuple[Tensor | None, Tensor] | None = None
    pool_weights: Tensor | None = None


def prepare(
    prior: Distribution,
    main: ConditionalDensityEstimator,
    simulations: Simulations,
    held_out: HeldOut,
    options: JeffreysOptions,
    num_steps: int,
    max_epochs: int,
    patience: int,
    show_progress_bars: bool,
) -> Prepared:
    """Fit the proxy that the options ask for, compare it with the main, draw its pool.

    Args:
        prior: The trainer's prior; an empirical one gets a kernel density.
        main: The main after stage 0, at its best weights, in evaluation mode.
        simulations: Data and split.
        held_out: The held-out pairs.
        options: The proxy's options.
        num_steps: Of the symmetric stage.
        max_epochs: Bound on the epochs of each of the proxy's networks.
        patience: Their early stopping.
        show_progress_bars: Whether to show progress.

    Returns:
        The proxy and the verdict on it.
    """
    if isinstance(prior, ImproperEmpirical):
        prior = EmpiricalPrior(simulations.theta[simulations.train])
    theta = simulations.theta[simulations.train]
    if bool((theta == theta[:1]).all()):
        return Prepared(None, "theta is constant: there is nothing to learn about it")
    proxy, note = build_proxy(prior, main, simulations.x, options)
    if proxy is None:
        return Prepared(None, note)
    proxy.to(simulations.theta.device)
    if isinstance(proxy, EnergyProxy):
        proxy.set_proposal(main, atomic=held_out.atomic)
    with tqdm(desc="Fitting proxy", disable=not show_progress_bars) as bar:
        proxy.fit(
            simulations.theta,
            simulations.x,
            simulations.train,
            simulations.val,
            on_epoch=lambda epoch, value: bar.update(),
            max_epochs=max_epochs,
            patience=patience,
        )
    note += _temper(proxy, main, held_out, options)
    main_nll, proxy_nll = held_out.main(main, proxy), held_out.proxy(proxy, main)
    t = float(trust(proxy_nll, main_nll)) if options.adaptive else 1.0
    verdict = Prepared(proxy, note, False, proxy_nll, main_nll, t)
    if t < options.min_trust:
        return _refuse(verdict, f"not trusted (t = {t:.2g})")
    num_draws = options.draws_for(num_steps)
    pool = draw_pool(proxy, simulations, held_out.atomic, num_draws)
    if len(pool[1]) < max(1, _MIN_POOL * num_draws) and proxy.can_sample:
        return _refuse(verdict, "its draws of x are implausible")
    weights = tempering_weights(proxy, *pool)
    return replace(verdict, usable=True, pool=pool, pool_weights=weights)


def _temper(
    proxy: Proxy, main: ConditionalDensityEstimator, held_out: HeldOut, options: JeffreysOptions
) -> str:
    """Set the proxy's temperature by held-out evidence; what to say about it."""
    proxy.inverse_temperature.fill_(1.0)
    if not (options.adaptive and options.temper and proxy.can_be_tempered):
        return ""
    gamma = held_out.inverse_temperature(proxy, main)
    proxy.inverse_temperature.fill_(gamma)
    return "" if gamma == 1 else f"; held-out pairs find it too flat: log factor times {gamma:.2f}"


def _refuse(verdict: Prepared, reason: str) -> Prepared:
    return replace(verdict, note=f"{verdict.note}; {reason}, plain NPE kept")


def draw_pool(
    proxy: Proxy, simulations: Simulations, atomic: bool, num_draws: int
) -> tuple[Tensor | None, Tensor]:
    """Observations for G and R, with their θ where those follow the prior's posterior.

    Args:
        proxy: A fitted proxy.
        simulations: Data and split.
        atomic: Whether the rounds' θ come from a proposal that the loss corrects for.
        num_draws: Size of the pool.

    Returns:
        θ `(N, D)` or None (G is then reweighted from the main's samples), and x `(N, *x_shape)`.
    """
    if not proxy.can_sample:
        return None, simulations.x[simulations.train]
    if simulations.round_ == 0:
        return proxy.sample_joint(num_draws)
    # Later rounds: observations where the rounds simulate, at θ of the training simulations.
    rows = simulations.train[torch.randint(len(simulations.train), (num_draws,))]
    theta, x = proxy.sample_given(simulations.theta[rows])
    return (None if atomic else theta), x


@torch.no_grad()
def tempering_weights(proxy: Proxy, theta: Tensor | None, x: Tensor) -> Tensor:
    """Weights in proportion to ℓ_ψ^{γ−1}: under them, θ given x follows q_{ψ,γ} in the pool.

    Args:
        proxy: The proxy, at its temperature.
        theta: Of the pool, or None where there are none to weigh.
        x: Of the pool.

    Returns:
        Shape `(N,)`, mean one; ones at γ = 1.
    """
    gamma = proxy.inverse_temperature
    if theta is None or gamma == 1 or len(x) == 0:
        return torch.ones(len(x), device=x.device)
    log_weights = (gamma - 1) * proxy.log_factor(theta.unsqueeze(0), x)[0]
    return len(x) * truncated_log_weights(log_weights).exp()

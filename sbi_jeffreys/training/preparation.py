"""From a plain NPE to the symmetric stage: fit the proxy, weigh it, draw its pool, begin."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace

from torch import Tensor
from torch.distributions import Distribution
from tqdm.auto import tqdm

from sbi_jeffreys._sbi import (
    ConditionalDensityEstimator,
    ImproperEmpirical,
    MixedDensityEstimator,
)
from sbi_jeffreys.networks.prior_space import has_discrete_part
from sbi_jeffreys.networks.transforms import varying
from sbi_jeffreys.options import JeffreysOptions
from sbi_jeffreys.proxies import (
    EmpiricalPrior,
    EnergyProxy,
    LikelihoodProxy,
    Proxy,
    build_proxy,
    hand_back_embedding,
    leave_out_uninformative,
)
from sbi_jeffreys.proxies.chains import MixtureOfRounds
from sbi_jeffreys.proxies.normaliser import AdaptedDraws
from sbi_jeffreys.proxies.truncated import TruncatedRounds, of_truncated_rounds
from sbi_jeffreys.training.arguments import TrainArguments
from sbi_jeffreys.training.data import Simulations
from sbi_jeffreys.training.held_out import HeldOut
from sbi_jeffreys.training.loss import SymmetricLoss
from sbi_jeffreys.training.multipliers import trust
from sbi_jeffreys.training.pool import (
    Pool,
    draw_pool,
    pool_of_later_rounds,
    resampled_pool,
    tempering_weights,
)
from sbi_jeffreys.training.refit import restored_if_interrupted, summarise
from sbi_jeffreys.training.report import Kept, ProxyStatus
from sbi_jeffreys.training.stage import SymmetricStage
from sbi_jeffreys.training.symmetric import Best, SymmetricTraining
from sbi_jeffreys.training.tempering import set_temperature

__all__ = ["Budget", "Prepared", "Simulations", "begin_stage", "prepare"]

# Range of log γ in which draws that were adapted to γ = 1 are used again. Its upper end is further
# from 0, since a sharper target has bounded weights under these draws.
_SAME_DRAWS = -0.1, 0.4
_USES_OF_EXPENSIVE = 5  # mean uses of each pair of a renewable pool that is expensive to draw
_DRAWS_OF_LATER_ROUNDS = 10_000  # each of these takes some dozens of evaluations of the proxy
_MIN_POOL = 0.05  # share of the proxy's draws that must be plausible


@dataclass(frozen=True)
class Prepared:
    """A fitted proxy and what was found out about it.

    Attributes:
        status: Whether the symmetric stage should run, and if not, why.
        proxy: The fitted proxy; None where there is none for these simulations.
        note: Which proxy it is, and why, in words.
        proxy_losses: Held-out losses of the proxy, `(M,)`.
        main_losses: Held-out losses of the main that the proxy was compared with, `(M,)`.
        trust: t in [0, 1].
        pool: Observations of the symmetric stage, where it should run.
        proxy_value: P_val, the mean of `proxy_losses`.
        main_value: V_NPE, the mean of `main_losses`.
        weights: Weights of the held-out pairs, `(M,)`; None where there are no losses.
        uncertain: Share of the pairs at which the proxy's loss could not be bounded well.
        atomic: Whether the losses are those of classifying θ among other pairs' θ.
    """

    status: ProxyStatus
    proxy: Proxy | None
    note: str
    proxy_losses: Tensor | None = None
    main_losses: Tensor | None = None
    trust: float = 0.0
    pool: Pool | None = None
    proxy_value: float = math.inf
    main_value: float = math.inf
    atomic: bool = False
    uncertain: float = 0.0
    weights: Tensor | None = None


@dataclass(frozen=True)
class Budget:
    """How long the parts of the preparation may take.

    Attributes:
        num_steps: Steps of the symmetric stage, which the pool is drawn for.
        max_epochs: Bound on the epochs of each of the proxy's networks.
        patience: Epochs without improvement before a network's fit stops.
        show_progress_bars: Whether to show progress.
    """

    num_steps: int
    max_epochs: int
    patience: int
    show_progress_bars: bool


def prepare(
    prior: Distribution,
    main: ConditionalDensityEstimator,
    simulations: Simulations,
    held_out: HeldOut,
    kernel: Callable[[Tensor], Tensor],
    options: JeffreysOptions,
    budget: Budget,
) -> Prepared:
    """Fit the proxy that the options ask for, compare it with the main, draw its pool.

    Args:
        prior: The trainer's prior; for sbi's stand-in for none, a kernel density is used.
        main: The main after stage 0, at its best weights, in evaluation mode.
        simulations: Data and split.
        held_out: The held-out pairs.
        kernel: Calibration kernel, which weighs the pool.
        options: The proxy's options.
        budget: Bounds on epochs and steps.

    Returns:
        The proxy and its status.
    """
    proxy, note = _choose(prior, main, simulations, options)
    if proxy is None:
        return Prepared(ProxyStatus.ABSENT, None, note)
    if isinstance(proxy, EnergyProxy):
        proxy.set_proposal(main, atomic=held_out.atomic)
    with tqdm(desc="Fitting proxy", disable=not budget.show_progress_bars) as bar:
        proxy.fit(
            simulations.theta,
            simulations.x,
            *simulations.for_fit(),
            on_epoch=lambda epoch, value: bar.update(),
            max_epochs=budget.max_epochs,
            patience=budget.patience,
        )
    if proxy.remark:
        note = f"{note}; {proxy.remark}"
    proxy.inverse_temperature.fill_(1.0)
    if held_out.excluded:  # mutant: trusted-by-excluded-pairs
        return Prepared(ProxyStatus.NO_KERNEL_WEIGHT, proxy, note)
    draws = None if held_out.atomic else held_out.draws(proxy, main)
    if options.adaptive and options.temper:  # mutant: frozen-and-tempered, temper-dead
        bounds = budget.max_epochs, budget.patience
        set_temperature(proxy, main, simulations, held_out, draws, kernel, *bounds)
    found = _judge(proxy, note, main, held_out, draws, options)
    if found.trust < options.min_trust:  # mutant: bad-proxy-followed
        return found
    return _with_pool(found, proxy, main, simulations, kernel, options, budget)


def _choose(
    prior: Distribution,
    main: ConditionalDensityEstimator,
    simulations: Simulations,
    options: JeffreysOptions,
) -> tuple[Proxy | None, str]:
    """A proxy for these simulations, not yet fitted, or None; and in words, which one and why."""
    if isinstance(prior, ImproperEmpirical):
        prior = EmpiricalPrior(simulations.theta[simulations.train])
    if has_discrete_part(prior) or isinstance(main, MixedDensityEstimator):
        return None, "theta has discrete parameters, which have no density: use sbi's MNPE"
    fixed = (~varying(simulations.theta[simulations.train])).nonzero().flatten().tolist()
    if fixed:  # mutant: constant-parameters-modelled
        note = f"theta is constant in dimensions {fixed}: leave these dimensions out"
        return None, note
    proxy, note = build_proxy(prior, main, simulations.x, options)
    if proxy is None:
        return None, note
    if simulations.rounds is not None:  # mutant: truncated-rounds-overlooked
        proxy = of_truncated_rounds(proxy, TruncatedRounds(prior, simulations.rounds))
    return proxy.to(simulations.theta.device), note


def _judge(
    proxy: Proxy,
    note: str,
    main: ConditionalDensityEstimator,
    held_out: HeldOut,
    draws: AdaptedDraws | None,
    options: JeffreysOptions,
) -> Prepared:
    """The proxy compared with the main on held-out pairs, and how far it is trusted."""
    low, high = _SAME_DRAWS
    if not low <= float(proxy.inverse_temperature.log()) <= high:
        draws = None  # too far from the temperature that they were adapted to
    main_losses = held_out.main_losses(main, proxy)
    proxy_losses, uncertain = held_out.proxy_losses(proxy, main, draws)
    proxy_value, main_value = held_out.mean(proxy_losses), held_out.mean(main_losses)
    return Prepared(
        ProxyStatus.UNTRUSTED,
        proxy,
        note,
        proxy_losses,
        main_losses,
        trust=float(trust(proxy_value, main_value)) if options.adaptive else 1.0,
        proxy_value=proxy_value,
        main_value=main_value,
        atomic=held_out.atomic,
        uncertain=float(uncertain.float().mean()),
        weights=held_out.weights,
    )


def _with_pool(
    found: Prepared,
    proxy: Proxy,
    main: ConditionalDensityEstimator,
    simulations: Simulations,
    kernel: Callable[[Tensor], Tensor],
    options: JeffreysOptions,
    budget: Budget,
) -> Prepared:
    """What was found, with the pool of a proxy that is trusted, or why there is none."""
    first_round = simulations.round_ == 0
    train = simulations.deciding if found.atomic else simulations.train
    theta, x = simulations.theta[train], simulations.x[train]
    if proxy.can_sample:
        # mutant: pool-of-the-default-alone
        num_draws = options.draws_for(budget.num_steps, x[0].numel())
        if found.atomic and options.proxy_draws is None:
            # mutant: as-many-draws-in-later-rounds
            num_draws = min(num_draws, _DRAWS_OF_LATER_ROUNDS)
        theta, x = draw_pool(proxy, theta, first_round, num_draws)
        if len(x) < max(1, _MIN_POOL * num_draws):
            return replace(found, status=ProxyStatus.IMPLAUSIBLE)
    if proxy.can_sample and not found.atomic:
        # mutant: tempered-pool-not-used
        weights = tempering_weights(proxy, theta, x)
        pool = Pool(theta, x, weights, asked=num_draws)  # mutant: pool-size-forgotten
        cheap = isinstance(proxy, LikelihoodProxy) and proxy.draws_cheaply
        kept = kernel(x)
        alike = bool(((kept == kept[0]) & (kept > 0)).all())
        # Of wide x, memory holds fewer draws than the stage needs.
        few = options.proxy_draws is None and num_draws < options.draws_for(budget.num_steps)
        pool.renewable = first_round and alike and (few or (cheap and bool((weights == 1).all())))
        if not cheap:
            pool.uses = _USES_OF_EXPENSIVE
    elif found.atomic:  # θ̃ of the pairs follow the rounds' proposals, not the prior
        mixture = MixtureOfRounds(proxy, simulations.theta_by_rounds)
        archive, bars = simulations.theta[train], budget.show_progress_bars
        pool = pool_of_later_rounds(proxy, theta, x, mixture, archive, bars)
    else:
        pool = resampled_pool(proxy, main, theta, x)
    if not bool(pool.weights.sum() > 0):  # mutant: kernel-blamed
        return replace(found, status=ProxyStatus.UNSAMPLED)
    pool.weights = pool.weights * kernel(pool.x)
    if not bool(pool.weights.sum() > 0):
        return replace(found, status=ProxyStatus.NO_KERNEL_WEIGHT)
    return replace(found, status=ProxyStatus.USED, pool=pool)


def begin_stage(
    found: Prepared,
    main: ConditionalDensityEstimator,
    held_out: HeldOut,
    options: JeffreysOptions,
    arguments: TrainArguments,
    budget: Budget,
) -> SymmetricTraining:
    """The symmetric stage before its first step, with plain NPE as the best main so far.

    The stage starts from plain NPE with the embedding net that the proxy has trained further, and
    without the outputs that the proxy found uninformative. Where the proxy is a density of linear
    summaries, the main may get these as its input and be fitted again (see `summarise`). What the
    report says of plain NPE is measured before these changes, and the main is left as plain NPE
    until the stage runs.

    Args:
        found: A proxy that is used.
        main: Plain NPE.
        held_out: The held-out pairs.
        options: The stage's options.
        arguments: Arguments of `train`.
        budget: The stage's length, and whether to show progress.
    """
    assert found.proxy is not None
    assert found.pool is not None
    assert found.main_losses is not None
    main.eval()
    plain = deepcopy(main.state_dict())
    best = Best(found.main_value, found.main_losses, plain, Kept.PLAIN_NPE)
    # mutant: coverage-of-a-changed-npe
    coverage = None if held_out.atomic else held_out.coverage(main, found.proxy.prior)
    with restored_if_interrupted(main, plain):
        hand_back_embedding(found.proxy, main)
        leave_out_uninformative(found.proxy, main)
        show, value = budget.show_progress_bars, found.main_value
        summarise(found.proxy, main, found.pool, held_out, value, show)  # mutant: main-sees-noise
    stage = SymmetricStage(
        SymmetricLoss(main, found.proxy, found.pool, options, found.trust),
        options,
        arguments.learning_rate,
        arguments.clip_max_norm,
        entropy=min(found.proxy_value, found.main_value),
        npe_nll=found.main_value,
        num_steps=budget.num_steps,
    )
    symmetric = SymmetricTraining(
        stage,
        best,
        found.main_losses,
        found.proxy_losses,
        coverage_before=coverage,
        start=deepcopy(main.state_dict()),
    )
    symmetric.pause()  # mutant: changed-npe-left-in-the-main
    return symmetric

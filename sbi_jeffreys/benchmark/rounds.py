"""Several rounds at one observation: accuracy, leakage and time, round by round.

Per round: the C2ST to the reference, the share of the density estimator's raw draws inside the
prior (its acceptance rate), and how long the posterior samples take; after the last round of
`NPE_Jeffreys`, the C2ST of its corrected and of its focused posterior too.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from sbi.inference import NLE, NPE, MCMCPosterior
from sbi.inference.posteriors.posterior_parameters import MCMCPosteriorParameters
from sbi.utils import RestrictedPrior, get_density_thresholder
from torch import Tensor

from sbi_jeffreys import CorrectedPosterior, NPE_Jeffreys
from sbi_jeffreys.benchmark._arguments import (
    DEFAULT,
    add_run_arguments,
    known_items,
    positive_int,
    seed_range,
    task_list,
)
from sbi_jeffreys.benchmark._running import derive_seed, measured, seeded
from sbi_jeffreys.benchmark.entries import run_study
from sbi_jeffreys.benchmark.evaluation import EvaluationSettings, observations_for
from sbi_jeffreys.benchmark.fitted import corrected_posterior, focused_posterior
from sbi_jeffreys.benchmark.methods import FitContext, main_network, proxy_is_usable
from sbi_jeffreys.benchmark.metrics import c2st
from sbi_jeffreys.benchmark.references import reference_samples
from sbi_jeffreys.benchmark.rounds_page import CHECK, STUDY, write_page
from sbi_jeffreys.benchmark.tasks import Task, get_task
from sbi_jeffreys.diagnostics.calibration import inside_prior

_THRESHOLD_DRAWS = 100_000  # for the support of truncated proposals; sbi's million takes minutes


@dataclass(frozen=True)
class SequentialMethod:
    """A method over rounds.

    Attributes:
        trainer: sbi's NPE or NLE, or ours.
        proposal: What later rounds draw from: the posterior or the corrected posterior, with the
            atomic loss, or the truncated prior (Deistler et al. 2022).
    """

    trainer: Literal["npe", "nle", "npe_jeffreys"] = "npe_jeffreys"
    proposal: Literal["posterior", "corrected", "truncated"] = "posterior"

    def build(self, task: Task, context: FitContext) -> Any:
        """The trainer."""
        network, common = main_network(task, "nsf"), context.trainer_kwargs
        if self.trainer == "npe_jeffreys":
            return NPE_Jeffreys(task.prior, network, options=context.options(), **common)
        if self.trainer == "nle":
            return NLE(task.prior, **common)
        return NPE(task.prior, network, **common)


#: By the names of `rounds_page.LABELS`.
METHODS = {
    "npe_nsf": SequentialMethod("npe"),
    "npe_truncated": SequentialMethod("npe", "truncated"),
    "nle_mcmc": SequentialMethod("nle"),
    "npe_jeffreys": SequentialMethod(),
    "npe_jeffreys_corrected": SequentialMethod(proposal="corrected"),
    "npe_jeffreys_truncated": SequentialMethod(proposal="truncated"),
}


@dataclass(frozen=True)
class RoundsSettings:
    """What is measured.

    Attributes:
        rounds: Number of rounds, the first one, from the prior, included.
        simulations: Simulations per round.
        observation_seed: Seed of the observations; training seed s takes observation s.
        raw_draws: Draws of the estimator for the acceptance rate.
        num_samples: Posterior samples per round, timed and compared with the reference.
        max_seconds: Time after which sampling counts as stalled, which ends the measurement.
        classifier: Classifier of the C2ST, "rf" or "mlp".
        fast: Whether methods train for a few steps only.
    """

    rounds: int = 4
    simulations: int = 500
    observation_seed: int = 2026
    raw_draws: int = 10_000
    num_samples: int = 1000
    max_seconds: float = 120.0
    classifier: str = "rf"
    fast: bool = False


# ------------------------------------------------------------------ measuring


def measure_rounds(
    context: FitContext, task: Task, method: SequentialMethod, seed: int, settings: RoundsSettings
) -> dict[str, Any]:
    """All rounds of one method at one observation.

    Returns:
        `results`, with `rounds`: per round `acceptance` (None for NLE), `sampling_seconds` (None:
        stalled), `cpu_seconds`, `c2st` (None: stalled); and `corrected` and `focused`, the C2ST of
        these posteriors after the last round, None where there are none.
    """
    observations = EvaluationSettings(
        observations=seed + 1, observation_seed=settings.observation_seed
    )
    x_o = observations_for(task, observations)[seed]
    reference = reference_samples(task, x_o, settings.num_samples)
    found: list[dict[str, float | None]] = []
    with seeded(derive_seed("rounds", task.name, seed)):
        inference, posterior = method.build(task, context), None
        for _ in range(settings.rounds):
            with measured() as cost:
                posterior = _next_round(task, inference, posterior, method, context, settings)
            posterior.set_default_x(x_o[None])
            start = time.perf_counter()
            samples = _samples(posterior, settings.num_samples, settings.max_seconds)
            seconds = time.perf_counter() - start
            stalled = samples is None
            found.append(
                {
                    "acceptance": _acceptance(task, posterior, x_o, settings.raw_draws),
                    "sampling_seconds": None if stalled else seconds,
                    "cpu_seconds": cost.cpu_seconds,
                    "c2st": _score(reference, samples, settings),
                }
            )
            if stalled:
                break
        others = _other_posteriors(inference, x_o, context)
        size = (settings.num_samples,)
        scores = {
            name: _score(reference, other.sample(size, show_progress_bars=False), settings)
            for name, other in others.items()
        }
    return {"results": {"rounds": found, "corrected": None, "focused": None, **scores}}


def _acceptance(task: Task, posterior: Any, x_o: Tensor, num: int) -> float | None:
    """Share of a density estimator's raw draws inside the prior; None of a likelihood."""
    if not hasattr(posterior, "posterior_estimator"):
        return None
    raw = posterior.posterior_estimator.sample(torch.Size((num,)), x_o[None])[:, 0]
    return float(inside_prior(task.prior, raw).double().mean())


def _score(reference: Tensor, samples: Tensor | None, settings: RoundsSettings) -> float | None:
    """C2ST of samples to the reference; None without samples."""
    if samples is None:
        return None
    return c2st(reference, samples, classifier=settings.classifier)


def _other_posteriors(inference: Any, x_o: Tensor, context: FitContext) -> dict[str, Any]:
    """The corrected and the focused posterior of `NPE_Jeffreys`, where there is a proxy."""
    if not isinstance(inference, NPE_Jeffreys) or not proxy_is_usable(inference):
        return {}
    corrected = corrected_posterior(inference, context.fast)
    return {
        "corrected": corrected.set_default_x(x_o[None]),
        "focused": focused_posterior(inference, x_o, context.fast),
    }


def _next_round(
    task: Task,
    inference: Any,
    posterior: Any,
    method: SequentialMethod,
    context: FitContext,
    settings: RoundsSettings,
) -> Any:
    """Simulate from the proposal that the previous posterior gives, train; the new posterior."""
    num, kwargs = settings.simulations, dict(context.train_kwargs)
    proposal = posterior
    if posterior is None:
        theta = task.prior.sample(torch.Size((num,)))
    elif method.proposal == "truncated":
        draws = 200 if settings.fast else _THRESHOLD_DRAWS
        accept = get_density_thresholder(posterior, num_samples_to_estimate_support=draws)
        proposal = RestrictedPrior(task.prior, accept, sample_with="rejection")
        theta = proposal.sample((num,), show_progress_bars=False)
        kwargs["force_first_round_loss"] = True
    else:
        if method.proposal == "corrected" and proxy_is_usable(inference):
            x_o = posterior.default_x  # of shape (1, dim_x)
            proposal = corrected_posterior(inference, context.fast).set_default_x(x_o)
        theta = _samples(proposal, num, settings.max_seconds)
        assert theta is not None  # sampling did not stall at the end of the previous round
    # NLE learns p(x|θ), which no proposal changes.
    given = {} if method.trainer == "nle" else {"proposal": proposal}
    inference.append_simulations(theta, task.simulate(theta), **given)
    inference.train(**kwargs)
    if method.trainer == "nle" and settings.fast:
        few = MCMCPosteriorParameters(num_chains=2, warmup_steps=2)
        return inference.build_posterior(posterior_parameters=few)
    return inference.build_posterior()


def _samples(posterior: Any, num: int, max_seconds: float) -> Tensor | None:
    """Posterior samples `(num, D)` at the default x, or None where rejection takes too long."""
    limits = {"max_sampling_time": max_seconds, "return_partial_on_timeout": True}
    if isinstance(posterior, MCMCPosterior | CorrectedPosterior):
        limits = {}  # neither of them rejects
    drawn = posterior.sample((num,), show_progress_bars=False, **limits)
    return drawn.detach() if len(drawn) == num else None


# ------------------------------------------------------------------ the command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `rounds`."""
    text = f"comma-separated {DEFAULT}"
    tasks, methods = "two_moons,gaussian_linear_uniform", ",".join(METHODS)
    known = partial(known_items, names=METHODS)
    parser.add_argument("--tasks", type=task_list, default=tasks, help=text)
    parser.add_argument("--methods", type=known, default=methods, help=text)
    parser.add_argument("--rounds", type=positive_int(), default=4, help=f"how many {DEFAULT}")
    parser.add_argument("--simulations-per-round", type=positive_int(20), default=500, help=DEFAULT)
    text = "per round (default: 1000, with --fast 50)"
    parser.add_argument("--num-samples", type=positive_int(10), default=None, help=text)
    add_run_arguments(parser, "rounds", seeds=2)


def run(args: argparse.Namespace) -> int:
    """Measure the rounds and write `rounds.md`; the exit code, 1 if something failed."""
    small = {"raw_draws": 200, "num_samples": 50, "fast": True} if args.fast else {}
    if args.num_samples is not None:
        small |= {"num_samples": args.num_samples}
    settings = RoundsSettings(args.rounds, args.simulations_per_round, **small)
    measurements = []
    for seed, (name, method) in product(seed_range(args), product(args.tasks, args.methods)):
        key = {"task": name, "seed": f"s{seed}", "method": method}
        arguments = {"task": get_task(name), "method": METHODS[method]}
        measurements.append((key, {**arguments, "seed": seed, "settings": settings}))
    shared = asdict(settings)
    return run_study(STUDY, measurements, measure_rounds, shared, CHECK, write_page, args)

"""Leakage over rounds: how much of the density estimator stays inside the prior, round by round.

Sequential inference at one observation. Per round: the share of the estimator's raw draws inside
the prior (its acceptance rate), and how long 1,000 posterior samples take; after the last round,
the C2ST to the reference.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from sbi.inference import NPE
from sbi.utils import RestrictedPrior, get_density_thresholder
from torch import Tensor

from sbi_jeffreys import NPE_Jeffreys
from sbi_jeffreys.benchmark._arguments import known_items, positive_int, task_list
from sbi_jeffreys.benchmark._running import derive_seed, measured, seeded
from sbi_jeffreys.benchmark.evaluation import EvaluationSettings, observations_for
from sbi_jeffreys.benchmark.methods import FitContext, main_network
from sbi_jeffreys.benchmark.metrics import c2st
from sbi_jeffreys.benchmark.references import reference_samples
from sbi_jeffreys.benchmark.rounds_table import CHECK, STUDY, write_table
from sbi_jeffreys.benchmark.runner import (
    Outcome,
    add_run_arguments,
    report_outcome,
    run_entries,
    study_entry,
)
from sbi_jeffreys.benchmark.tasks import Task, get_task
from sbi_jeffreys.diagnostics.calibration import inside_prior

__all__ = ["METHODS", "RoundsSettings", "add_arguments", "run", "run_rounds"]

_THRESHOLD_DRAWS = 100_000  # for the support of truncated proposals; sbi's million takes minutes


@dataclass(frozen=True)
class SequentialMethod:
    """A method over rounds.

    Attributes:
        label: In tables.
        jeffreys: NPE_Jeffreys, or sbi's NPE.
        truncated: Whether later rounds draw from the truncated prior (Deistler et al. 2022), or
            from the posterior, with the atomic loss.
    """

    label: str
    jeffreys: bool = True
    truncated: bool = False

    def build(self, task: Task, context: FitContext) -> Any:
        """The trainer."""
        network, common = main_network(task, "nsf"), context.trainer_kwargs
        if self.jeffreys:
            return NPE_Jeffreys(task.prior, network, options=context.options(), **common)
        return NPE(task.prior, network, **common)


METHODS = {
    "npe_nsf": SequentialMethod("NPE, atomic", jeffreys=False),
    "npe_jeffreys": SequentialMethod("NPE_Jeffreys, atomic"),
    "npe_jeffreys_truncated": SequentialMethod("NPE_Jeffreys, truncated", truncated=True),
}


@dataclass(frozen=True)
class RoundsSettings:
    """What is measured.

    Attributes:
        rounds: How many, the first one, from the prior, included.
        simulations: Per round.
        observation_seed: Of the observations; seed s takes observation s.
        raw_draws: Of the estimator, for the acceptance rate.
        num_samples: Posterior samples to be timed and compared with the reference.
        max_seconds: After which sampling counts as stalled, which ends the measurement.
        classifier: Of the C2ST, "rf" or "mlp".
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


def measure_rounds(
    context: FitContext, task: Task, method: SequentialMethod, seed: int, settings: RoundsSettings
) -> dict[str, Any]:
    """All rounds of one method at one observation.

    Returns:
        `results`, with `rounds`: per round `acceptance`, `sampling_seconds` (None: stalled),
        `cpu_seconds`; and `c2st` after the last one, None where sampling stalled before.
    """
    observations = EvaluationSettings(
        observations=seed + 1, observation_seed=settings.observation_seed
    )
    x_o = observations_for(task, observations)[seed]
    found: list[dict[str, float | None]] = []
    with seeded(derive_seed("rounds", task.name, seed)):
        inference, posterior = method.build(task, context), None
        samples: Tensor | None = None
        for _ in range(settings.rounds):
            with measured() as cost:
                posterior = _next_round(task, inference, posterior, method, context, settings)
            posterior.set_default_x(x_o[None])
            raw = posterior.posterior_estimator.sample(
                torch.Size((settings.raw_draws,)), x_o[None]
            )[:, 0]
            start = time.perf_counter()
            samples = _samples(posterior, settings.num_samples, settings.max_seconds)
            seconds = None if samples is None else time.perf_counter() - start
            found.append(
                {
                    "acceptance": float(inside_prior(task.prior, raw).double().mean()),
                    "sampling_seconds": seconds,
                    "cpu_seconds": cost.cpu_seconds,
                }
            )
            if samples is None:
                break
    score = None
    if samples is not None:
        reference = reference_samples(task, x_o, settings.num_samples)
        score = c2st(reference, samples, classifier=settings.classifier)
    return {"results": {"rounds": found, "c2st": score}}


def _next_round(
    task: Task,
    inference: Any,
    posterior: Any,
    method: SequentialMethod,
    context: FitContext,
    settings: RoundsSettings,
) -> Any:
    """Simulate where the previous posterior says, train; the new posterior."""
    num, kwargs = settings.simulations, dict(context.train_kwargs)
    proposal = posterior
    if posterior is None:
        theta = task.prior.sample(torch.Size((num,)))
    elif method.truncated:
        draws = 200 if settings.fast else _THRESHOLD_DRAWS
        accept = get_density_thresholder(posterior, num_samples_to_estimate_support=draws)
        proposal = RestrictedPrior(task.prior, accept, sample_with="rejection")
        theta = proposal.sample((num,), show_progress_bars=False)
        kwargs["force_first_round_loss"] = True
    else:
        theta = _samples(posterior, num, settings.max_seconds)
        assert theta is not None  # it did not stall for the samples before
    inference.append_simulations(theta, task.simulate(theta), proposal=proposal)
    inference.train(**kwargs)
    return inference.build_posterior()


def _samples(posterior: Any, num: int, max_seconds: float) -> Tensor | None:
    """Posterior samples `(num, D)` at the default x, or None where they take too long."""
    drawn = posterior.sample(
        (num,),
        show_progress_bars=False,
        max_sampling_time=max_seconds,
        return_partial_on_timeout=True,
    )
    return drawn.detach() if len(drawn) == num else None


def run_rounds(
    tasks: Sequence[str],
    seeds: int,
    settings: RoundsSettings,
    folder: Path,
    methods: Sequence[str] = tuple(METHODS),
    **how: Any,
) -> Outcome:
    """Measure what is not there yet; arguments as in `ablation.run_ablation`.

    Raises:
        CommandError: See `runner.run_entries`.
    """
    entries = []
    for seed, name, method in product(range(seeds), tasks, methods):
        key = {"task": name, "seed": f"s{seed}", "method": method}
        arguments = {"task": get_task(name), "method": METHODS[method]}
        arguments |= {"seed": seed, "settings": settings}
        entries.append(study_entry(STUDY, key, measure_rounds, arguments))
    return run_entries(entries, asdict(settings), folder, CHECK, **how)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rounds`."""
    number = "(default: %(default)s)"
    text = f"comma-separated {number}"
    tasks, methods = "two_moons,gaussian_linear_uniform", ",".join(METHODS)
    known = partial(known_items, names=METHODS)
    parser.add_argument("--tasks", type=task_list, default=tasks, help=text)
    parser.add_argument("--methods", type=known, default=methods, help=text)
    parser.add_argument("--rounds", type=positive_int(), default=4, help=f"how many {number}")
    parser.add_argument("--simulations-per-round", type=positive_int(20), default=500, help=number)
    add_run_arguments(parser, "benchmark_results/rounds", seeds=2)


def run(args: argparse.Namespace) -> int:
    """Measure the rounds and write `rounds.md`; 1 if something failed."""
    small = {"raw_draws": 200, "num_samples": 50, "fast": True} if args.fast else {}
    settings = RoundsSettings(args.rounds, args.simulations_per_round, **small)
    outcome = run_rounds(
        args.tasks, args.seeds, settings, args.out, args.methods,
        jobs=args.jobs, show_progress=not args.quiet,
    )  # fmt: skip
    labels = {name: method.label for name, method in METHODS.items()}
    return report_outcome(outcome, "measurements", args.out, write_table(args.out, labels))

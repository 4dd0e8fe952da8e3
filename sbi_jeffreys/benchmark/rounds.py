"""Leakage over rounds: how much of the density estimator stays inside the prior, round by round.

Sequential inference at one observation. Per round: the share of the estimator's raw draws inside
the prior (its acceptance rate), and how long 1,000 posterior samples take; after the last round,
the C2ST to the reference.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterable, Mapping
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
from sbi_jeffreys.benchmark._arguments import (
    DEFAULT,
    add_run_arguments,
    known_items,
    positive_int,
    task_list,
)
from sbi_jeffreys.benchmark._running import derive_seed, measured, seeded
from sbi_jeffreys.benchmark.cells import Number, study_check
from sbi_jeffreys.benchmark.entries import run_study
from sbi_jeffreys.benchmark.evaluation import EvaluationSettings, observations_for
from sbi_jeffreys.benchmark.methods import FitContext, main_network
from sbi_jeffreys.benchmark.metrics import c2st
from sbi_jeffreys.benchmark.references import reference_samples
from sbi_jeffreys.benchmark.statistics import Methods, Seeds, nest, paired_difference, summarise
from sbi_jeffreys.benchmark.tables import markdown, shown, write_study_page
from sbi_jeffreys.benchmark.tasks import Task, get_task
from sbi_jeffreys.diagnostics.calibration import inside_prior

_STUDY = "rounds"
_BASELINE = "npe_nsf"
_GOAL = 0.95  # the acceptance rate that every round should reach
_THRESHOLD_DRAWS = 100_000  # for the support of truncated proposals; sbi's million takes minutes
_ROUND = {
    "acceptance": Number(0.0, 1.0, nullable=False),
    "sampling_seconds": Number(0.0),
    "cpu_seconds": Number(0.0, nullable=False),
}
CHECK = study_check(
    _STUDY,
    {"task": str, "seed": re.compile(r"s\d+"), "method": str},
    {"rounds": [_ROUND], "c2st": Number(0.0, 1.0)},
)


@dataclass(frozen=True)
class SequentialMethod:
    """A method over rounds.

    Attributes:
        label: What tables call it.
        jeffreys: Whether it is NPE_Jeffreys, or sbi's NPE.
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
        rounds: Number of rounds, the first one, from the prior, included.
        simulations: Simulations per round.
        observation_seed: Seed of the observations; training seed s takes observation s.
        raw_draws: Draws of the estimator for the acceptance rate.
        num_samples: Posterior samples to be timed and compared with the reference.
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
            count = torch.Size((settings.raw_draws,))
            raw = posterior.posterior_estimator.sample(count, x_o[None])[:, 0]
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
    """Simulate from the proposal that the previous posterior gives, train; the new posterior."""
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
        assert theta is not None  # sampling did not stall at the end of the previous round
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


# ------------------------------------------------------------------ the table


def tabulate(records: Iterable[Mapping[str, Any]]) -> dict[str, Methods]:
    """Values by task, method and seed: `acceptance_1` …, `worst`, `slowest`, `stalled`, `c2st`."""
    return nest(_values(record) for record in records)


def _values(record: Mapping[str, Any]) -> tuple[str, str, int, dict[str, Any]]:
    key, rounds = record["key"], record["results"]["rounds"]
    accepted = [entry["acceptance"] for entry in rounds]
    seconds = [entry["sampling_seconds"] for entry in rounds]
    values: dict[str, Any] = {f"acceptance_{k}": a for k, a in enumerate(accepted, 1)}
    values["worst"] = min(accepted, default=None)
    values["slowest"] = max((s for s in seconds if s is not None), default=None)
    values["stalled"] = None in seconds
    values["cpu_seconds"] = sum(entry["cpu_seconds"] for entry in rounds)
    values["c2st"] = record["results"]["c2st"]
    return key["task"], key["method"], int(key["seed"].removeprefix("s")), values


def goal(seeds: Seeds) -> str:
    """Whether every round of every seed accepted enough and none stalled."""
    stalled = sum(values["stalled"] > 0 for values in seeds.values())
    if stalled:
        return f"MISSED: {stalled} of {len(seeds)} stalled"
    worst = min((values["worst"] for values in seeds.values() if "worst" in values), default=0.0)
    return f"met, worst {worst:.3f}" if worst >= _GOAL else f"MISSED, worst {worst:.3f}"


def _task_text(task: str, methods: Methods) -> str:
    """The table of one task."""
    every = {m for seeds in methods.values() for values in seeds.values() for m in values}
    last = max((int(m.rpartition("_")[2]) for m in every if m.startswith("acceptance")), default=0)
    numbers = range(1, last + 1)
    heads = [f"round {k}" for k in numbers]
    rows = [["method", "seeds", *heads, "goal", "slowest 1,000 (s)", "C2ST", "minus NPE", "cpu s"]]
    for name in (name for name in METHODS if name in methods):
        seeds = methods[name]
        slowest = max((v["slowest"] for v in seeds.values() if "slowest" in v), default=None)
        baseline = {} if name == _BASELINE else methods.get(_BASELINE, {})
        rows.append(
            [
                METHODS[name].label,
                str(len(seeds)),
                *(shown(summarise(seeds, f"acceptance_{k}"), ".3f") for k in numbers),
                goal(seeds),
                shown(slowest, ".2f"),
                shown(summarise(seeds, "c2st"), ".3f"),
                shown(paired_difference(seeds, baseline, "c2st")),
                shown(summarise(seeds, "cpu_seconds"), ".0f"),
            ]
        )
    return f"## {task}\n\n{markdown(rows)}"


def write_table(folder: Path) -> Path | None:
    """Sum up all results of a folder in `rounds.md`; its path, or None without any result."""
    return write_study_page(folder / "rounds.md", CHECK, _parts)


def _parts(records: list[dict[str, Any]]) -> list[str]:
    return [
        "# Leakage over rounds",
        "Share of the density estimator's raw draws that lie inside the prior, at the observation, "
        "after each round; mean ± standard error over seeds, each with an observation of its own. "
        f"The goal: at least {_GOAL} in every round of every seed, and sampling that never stalls. "
        "C2ST to the reference after the last round, 0.5 is perfect.",
        *(_task_text(*entry) for entry in sorted(tabulate(records).items())),
    ]


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
    add_run_arguments(parser, "benchmark_results/rounds", seeds=2)


def run(args: argparse.Namespace) -> int:
    """Measure the rounds and write `rounds.md`; the exit code, 1 if something failed."""
    small = {"raw_draws": 200, "num_samples": 50, "fast": True} if args.fast else {}
    settings = RoundsSettings(args.rounds, args.simulations_per_round, **small)
    measurements = []
    for seed, (name, method) in product(range(args.seeds), product(args.tasks, args.methods)):
        key = {"task": name, "seed": f"s{seed}", "method": method}
        arguments = {"task": get_task(name), "method": METHODS[method]}
        measurements.append((key, {**arguments, "seed": seed, "settings": settings}))
    shared = asdict(settings)
    return run_study(_STUDY, measurements, measure_rounds, shared, CHECK, write_table, args)

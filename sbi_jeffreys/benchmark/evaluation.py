"""One evaluation for every method: the same simulations, observations and test pairs, by seeds."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sbi_jeffreys._checks import check_choice, check_int
from sbi_jeffreys.benchmark._running import derive_seed, quiet, seeded
from sbi_jeffreys.benchmark.fitted import FittedMethod
from sbi_jeffreys.benchmark.metrics import c2st, evaluate_pairs, mode_l1
from sbi_jeffreys.benchmark.references import reference_samples
from sbi_jeffreys.benchmark.tasks import Task


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated; the same for all methods of a run.

    Attributes:
        observations: Observations with a reference posterior, drawn from the prior predictive.
        observation_seed: Seed of the observations; all training seeds and budgets share them.
        num_samples: Posterior and reference samples per observation. With few of them, a
            classifier finds smaller differences.
        test_pairs: Fresh pairs (θ*, x) for NLL, coverage, leakage and divergences.
        draws_per_pair: Posterior draws at each of them.
        classifier: Classifier of the C2ST: "mlp" or "rf", both sbi's.
        fast: Whether methods train for a few steps only.
    """

    observations: int = 5
    observation_seed: int = 2026
    num_samples: int = 5000
    test_pairs: int = 500
    draws_per_pair: int = 240
    classifier: str = "mlp"
    fast: bool = False

    def __post_init__(self) -> None:
        for name in ("observations", "test_pairs", "draws_per_pair"):
            check_int(name, getattr(self, name), 1)
        check_int("num_samples", self.num_samples, 10)  # which the C2ST's five folds need
        check_choice("classifier", self.classifier, ("rf", "mlp"))

    def smoke(self) -> EvaluationSettings:
        """The same, but so small that it only shows that everything runs."""
        return replace(self, num_samples=50, test_pairs=20, draws_per_pair=20, fast=True)


@dataclass
class EvaluationResult:
    """What was measured.

    Attributes:
        metrics: Values by name; NaN where a method has no density or a task no modes.
        per_observation: Values per observation, by name.
        samples: Posterior samples of each observation, `(num_samples, D)`.
        seconds: Time of drawing posterior samples (`sampling`) and of the whole `evaluation`.
    """

    metrics: dict[str, float]
    per_observation: dict[str, list[float]]
    samples: list[Tensor]
    seconds: dict[str, float]


def simulations_for(task: Task, num_simulations: int, seed: int) -> tuple[Tensor, Tensor]:
    """Training simulations of a (task, budget, seed): `(N, D)`, `(N, dim_x)`."""
    with seeded(derive_seed("simulations", task.name, num_simulations, seed)):
        return task.simulate_joint(num_simulations)


def observations_for(task: Task, settings: EvaluationSettings) -> Tensor:
    """Observations from the prior predictive; a larger number begins with the same ones."""
    drawn = []
    for index in range(settings.observations):
        with seeded(derive_seed("observation", task.name, settings.observation_seed, index)):
            drawn.append(task.simulate_joint(1)[1])
    return torch.cat(drawn)


def references_for(task: Task, settings: EvaluationSettings) -> list[Tensor]:
    """Reference samples at each observation, `(num_samples, D)`, cached on disk."""
    observations = observations_for(task, settings)
    return [reference_samples(task, x, settings.num_samples) for x in observations]


def pairs_for(task: Task, settings: EvaluationSettings) -> tuple[Tensor, Tensor]:
    """Fresh pairs from the joint, `(test_pairs, D)`, `(test_pairs, dim_x)`: one set per task."""
    with seeded(derive_seed("test pairs", task.name)):
        return task.simulate_joint(settings.test_pairs)


def evaluate(
    task: Task, fitted: FittedMethod, settings: EvaluationSettings, seed: int
) -> EvaluationResult:
    """Measure one trained posterior.

    Args:
        task: The task.
        fitted: The posterior.
        settings: What to measure.
        seed: Seed of the posterior samples.
    """
    start, sampling = time.perf_counter(), 0.0
    references, samples = references_for(task, settings), []
    per_observation: dict[str, list[float]] = {"c2st": [], "mode_l1": []}
    for index, x in enumerate(observations_for(task, settings)):
        with seeded(derive_seed("posterior samples", seed, index)), quiet():
            before = time.perf_counter()
            drawn = fitted.sample(x, settings.num_samples)
            sampling += time.perf_counter() - before
            reference = references[index]
            per_observation["c2st"].append(c2st(reference, drawn, classifier=settings.classifier))
            per_observation["mode_l1"].append(mode_l1(task, x, reference, drawn))
        for name, value in fitted.reports.items():
            per_observation.setdefault(name, []).append(value)
        samples.append(drawn)
    metrics = {name: math.fsum(values) / len(values) for name, values in per_observation.items()}
    metrics.update(pair_metrics(task, fitted, settings, seed))
    seconds = {"sampling": sampling, "evaluation": time.perf_counter() - start}
    return EvaluationResult(metrics, per_observation, samples, seconds)


def pair_metrics(
    task: Task, fitted: FittedMethod, settings: EvaluationSettings, seed: int
) -> dict[str, float]:
    """Metrics on the test pairs; none where the method has no density."""
    theta_true, x = pairs_for(task, settings)
    with seeded(derive_seed("pair draws", seed)), quiet():
        draws = fitted.pair_draws(theta_true, x, settings.draws_per_pair)
        return {} if draws is None else evaluate_pairs(task, theta_true, x, draws)

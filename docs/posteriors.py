"""Draw the README's picture: the posterior at one observation, and what two methods make of it.

    python docs/posteriors.py        # writes docs/posteriors.png; some minutes

The benchmark's own task, simulations, observation, methods and reference, by its own code. The
observation is the first of the benchmark's, whatever it looks like.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sbi_jeffreys.benchmark._running import derive_seed, seeded
from sbi_jeffreys.benchmark.evaluation import (
    EvaluationSettings,
    observations_for,
    references_for,
    simulations_for,
)
from sbi_jeffreys.benchmark.figures import saved
from sbi_jeffreys.benchmark.methods import FitContext, get_method
from sbi_jeffreys.benchmark.metrics import c2st
from sbi_jeffreys.benchmark.tasks import get_task
from sbi_jeffreys.diagnostics.drawing import COLOURS

TITLES = {"npe_nsf": "NPE", "npe_jeffreys": "NPE_Jeffreys"}
NUM_SAMPLES = 5_000


def posteriors(task_name: str, simulations: int, fast: bool) -> dict[str, tuple[Tensor, float]]:
    """Samples at the first observation and their C2ST to the reference's, by panel title."""
    task, seed = get_task(task_name), 0
    settings = EvaluationSettings(observations=1, num_samples=NUM_SAMPLES)
    reference, x_o = references_for(task, settings)[0], observations_for(task, settings)[0]
    theta, x = simulations_for(task, simulations, seed)
    found = {"True posterior": (reference, 0.5)}
    context = FitContext(fast=fast)
    for name, title in TITLES.items():
        start = derive_seed("training", task.name, simulations, seed)
        fitted = get_method(name).fit(task, theta, x, start, context)
        with seeded(derive_seed("posterior samples", seed, 0)):
            drawn = fitted.sample(x_o, NUM_SAMPLES)
        found[title] = drawn, c2st(reference, drawn)
    return found


def draw(found: dict[str, tuple[Tensor, float]], simulations: int, dims: tuple[int, int]) -> Any:
    """Three panels of samples on the same axes."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.7), sharex=True, sharey=True)
    everything = np.concatenate([samples[:, dims].numpy() for samples, _ in found.values()])
    low, high = np.quantile(everything, [0.001, 0.999], axis=0)
    margin = 0.08 * (high - low)
    for k, (axis, (title, (samples, score))) in enumerate(zip(axes, found.items())):
        colour = ("#444444", COLOURS[0], COLOURS[1])[k]
        axis.scatter(*samples[:, dims].numpy().T, s=2, color=colour, alpha=0.35, linewidths=0)
        sub = "reference samples" if k == 0 else f"{simulations:,} simulations, C2ST {score:.2f}"
        axis.set_title(f"{title}\n", fontsize=13, fontweight="bold")
        axis.text(0.5, 1.03, sub, transform=axis.transAxes, ha="center", fontsize=10)
        axis.set_xlabel(f"$\\theta_{dims[0] + 1}$")
        axis.set_xlim(low[0] - margin[0], high[0] + margin[0])
        axis.set_ylim(low[1] - margin[1], high[1] + margin[1])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"$\\theta_{dims[1] + 1}$")
    figure.tight_layout()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="slcp")
    parser.add_argument("--simulations", type=int, default=1_000)
    parser.add_argument("--dims", type=int, nargs=2, default=(2, 3), help="the two drawn")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("posteriors.png"))
    parser.add_argument("--fast", action="store_true", help="a smoke run, no measurement")
    args = parser.parse_args()
    found = posteriors(args.task, args.simulations, args.fast)
    for title, (_, score) in found.items():
        print(f"{title}: C2ST {score:.3f}")
    path = saved(args.out, lambda: draw(found, args.simulations, tuple(args.dims)))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

"""Can the proxy's held-out value be believed at the moment when training decides by it?

    python tests/attack_reading.py run OUT.jsonl --seeds 2
    python tests/attack_reading.py report OUT.jsonl

For every problem: the mean held-out loss of the proxy when trust was computed, from up to 256 draws
for each pair and plain NPE as the proposal, against a long-run one on the same pairs, from 2,048
draws with the trained main as the proposal; and both models on 200 fresh pairs. Results are
appended one line a cell, and cells that are there are skipped, so a run can be resumed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from cells import append, command_line, finished, grouped, rows, simulations
from torch import Tensor

from sbi_jeffreys import NPE_Jeffreys
from sbi_jeffreys._sbi import NoTracker
from sbi_jeffreys.benchmark.methods import main_network
from sbi_jeffreys.benchmark.tasks import get_task
from sbi_jeffreys.proxies.normaliser import adapted_draws

TASKS = (
    "two_moons",
    "slcp",
    "gaussian_mixture",
    "gaussian_linear",
    "gaussian_linear_uniform",
    "bernoulli_glm",
    "sir",
    "lotka_volterra",
    "bernoulli_glm_raw",
    "slcp_distractors",
    "iid_trials",
    "blurred_source",
    "damped_wave",
    "absorption_line",
    "absorption_line_300",
)
FRESH, LONG, SHORT = 200, 2_048, 512


def long_run(proxy, main, theta: Tensor, x: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The proxy's losses `(M,)` from both sides: with the smaller and the larger estimate of Z."""
    lower, upper = [], []
    for own, observed in zip(theta.split(10), x.split(10)):
        draws = adapted_draws(proxy, main, own, observed, num)
        log_z = draws.log_normaliser(proxy.inverse_temperature)
        log_q = draws.log_potential(proxy.inverse_temperature)[0]
        lower.append(log_z.lower - log_q)
        upper.append(log_z.upper - log_q)
    return torch.cat(lower), torch.cat(upper)


@torch.no_grad()
def read(inference: NPE_Jeffreys, task) -> dict[str, Any]:
    """What training believed, what many draws say, and the trace of R."""
    prepared = inference._training.prepared
    assert prepared is not None
    proxy, main = prepared.proxy, inference._neural_net
    assert proxy is not None
    assert prepared.proxy_losses is not None
    theta, x = (part[inference.val_indices] for part in inference.get_simulations()[:2])
    lower, upper = long_run(proxy, main, theta, x, LONG)
    torch.manual_seed(10_000)
    fresh_theta = task.prior.sample((FRESH,))
    fresh_x = task.simulate(fresh_theta)
    _, fresh = long_run(proxy, main, fresh_theta, fresh_x, SHORT)
    return {
        "trust": prepared.trust,
        "uncertain": prepared.uncertain,
        "believed": float(prepared.proxy_losses.mean()),
        "long_run_lower": float(lower.mean()),
        "long_run_upper": float(upper.mean()),
        "fresh": float(fresh.mean()),
        "fresh_median": float(fresh.median()),
        "reverse": [round(value, 3) for value in inference.summary["reverse_term"]],
        "npe": prepared.main_value,
        "main": float(-main.log_prob(theta.unsqueeze(0), x).mean()),  # type: ignore[union-attr]
        "main_fresh": float(-main.log_prob(fresh_theta.unsqueeze(0), fresh_x).mean()),  # type: ignore[union-attr]
    }


def run(arguments: argparse.Namespace) -> None:
    out = Path(arguments.out)
    done = finished(out)
    for seed in range(arguments.seeds):
        for name in arguments.only or TASKS:
            cell = (name, arguments.simulations, seed)
            if cell in done:
                continue
            task = get_task(name)
            theta, x = simulations(task, arguments.simulations, seed)
            inference = NPE_Jeffreys(
                task.prior,
                main_network(task, "nsf"),
                show_progress_bars=False,
                tracker=NoTracker(),
            )
            start = time.process_time()
            inference.append_simulations(theta, x).train()
            result = {"seconds": time.process_time() - start, **read(inference, task)}
            append(out, cell, result)
            print(*cell, result, flush=True)


def report(arguments: argparse.Namespace) -> None:
    print("| task | lowest trust | pairs marked | believed minus long run, seed by seed ", end="")
    print("| fresh: proxy | main | its worst seed |\n|" + "---|" * 7)
    for name, seeds in grouped(rows(Path(arguments.out))).items():
        marked, proxy, main = (
            [row[key] for row in seeds] for key in ("uncertain", "fresh", "main_fresh")
        )
        bias = [row["believed"] - row["long_run_upper"] for row in seeds]
        print(
            f"| {name} | {min(row['trust'] for row in seeds):.2f} | {100 * fmean(marked):.0f} % | "
            f"{', '.join(f'{value:+.2f}' for value in bias)} | {fmean(proxy):.2f} | "
            f"{fmean(main):.2f} | {max(main):.2f} |"
        )


if __name__ == "__main__":
    command_line(
        __doc__,
        run,
        report,
        simulations={"type": int, "default": 1000},
        seeds={"type": int, "default": 2},
        only={"nargs": "*", "default": ()},
    )

"""Does `misspecification_test` notice an observation that the simulator does not produce?

    python tests/attack_misspecified.py run OUT.jsonl --simulations 1000 --seeds 2
    python tests/attack_misspecified.py report OUT.jsonl

`NPE_Jeffreys` is trained as usual. Then 200 new simulations are tested as they are ("simulated"),
with one output moved by three of its standard deviations ("outlier"), and with the second half of
the outputs from another simulation ("mixed": each output is as usual, together they are not).
Counted are those with p ≤ 0.05, by our test and by sbi's `calc_misspecification_mmd` on
standardised x, both beside the simulations that training held out. Cells that are in the file are
skipped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from cells import append, command_line, finished, grouped, rows, simulations
from sbi.diagnostics.misspecification import (
    calculate_baseline_mmd,
    compute_rbf_mmd_median_heuristic,
)
from torch import Tensor

from sbi_jeffreys import NPE_Jeffreys, misspecification_test
from sbi_jeffreys._sbi import NoTracker
from sbi_jeffreys.benchmark.tasks import get_task

TASKS = ("two_moons", "gaussian_linear", "slcp", "sir", "lotka_volterra")
KINDS = ("simulated", "outlier", "mixed")
NUM, ALARM, SHUFFLES = 200, 0.05, 400


def observations(kind: str, x: Tensor, scale: Tensor) -> Tensor:
    """Simulations `(N, dim_x)` spoilt in some way."""
    x = x.clone()
    if kind == "outlier":
        column = torch.randint(x.shape[1], (len(x),))
        sign = torch.randint(2, (len(x),)) * 2.0 - 1
        x[torch.arange(len(x)), column] += 3 * sign * scale[column]
    elif kind == "mixed":
        half = x.shape[1] // 2
        x[:, half:] = x.roll(1, dims=0)[:, half:]
    return x


def mmd_p_values(x_o: Tensor, x: Tensor) -> Tensor:
    """sbi's test, for each observation by itself; what does not depend on it is computed once."""
    baseline = calculate_baseline_mmd(1, x, n_shuffle=SHUFFLES)
    found = torch.tensor([float(compute_rbf_mmd_median_heuristic(row[None], x)) for row in x_o])
    return 1 - (baseline < found.unsqueeze(1)).float().mean(dim=1)


def measured(name: str, num: int, seed: int) -> dict[str, Any]:
    task = get_task(name)
    theta, x = simulations(task, num, seed)
    trainer = NPE_Jeffreys(task.prior, show_progress_bars=False, tracker=NoTracker())
    trainer.append_simulations(theta, x).train()
    torch.manual_seed(10_000)
    fresh = task.simulate(task.prior.sample((NUM,)))
    held_out, center, scale = x[trainer.val_indices], x.mean(0), x.std(0)
    found: dict[str, Any] = {}
    with torch.no_grad():
        for kind in KINDS:
            x_o = observations(kind, fresh, scale)
            start = time.process_time()
            ours = misspecification_test(trainer, x_o).p_values
            seconds = time.process_time() - start
            mmd = mmd_p_values((x_o - center) / scale, (held_out - center) / scale)
            shares = {"ours": ours <= ALARM, "mmd": mmd <= ALARM}
            found[kind] = {key: float(value.float().mean()) for key, value in shares.items()}
            found[kind]["seconds"] = seconds
    return found


def run(arguments: argparse.Namespace) -> None:
    done = finished(Path(arguments.out)) if Path(arguments.out).exists() else set()
    for seed in range(arguments.seeds):
        for name in arguments.tasks:
            cell = (name, arguments.simulations, seed)
            if cell not in done:
                result = measured(*cell)
                append(Path(arguments.out), cell, result)
                print(*cell, result, flush=True)


def report(arguments: argparse.Namespace) -> None:
    cells = rows(Path(arguments.out))
    columns = [(kind, test) for kind in KINDS for test in ("ours", "mmd")]
    print("| task | seeds | " + " | ".join(f"{kind}: {test}" for kind, test in columns) + " |")
    print("|---" * (2 + len(columns)) + "|")
    for name, mine in grouped(cells).items():
        shares = [f"{mean(row[kind][test] for row in mine):.2f}" for kind, test in columns]
        print(f"| {name} | {len(mine)} | {' | '.join(shares)} |")


if __name__ == "__main__":
    command_line(
        __doc__,
        run,
        report,
        tasks={"nargs": "+", "default": TASKS},
        simulations={"type": int, "default": 1000},
        seeds={"type": int, "default": 1},
    )

"""What does accuracy cost? Held-out values against processor time, over settings and tasks.

    python tests/measure_cost.py run OUT.jsonl --tasks two_moons slcp --seeds 2
    python tests/measure_cost.py report OUT.jsonl
    python tests/measure_cost.py figure OUT.jsonl

sbi's NPE, the presets, and options that make training cheaper, on the same 1,000 simulations of
each task; on 500 fresh pairs the mean negative log density, corrected for leakage, and coverage.
Two of the default tasks are tuning tasks, three are reported ones. Cells that are in the file are
skipped, so a run can be resumed.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from attack_odd_simulators import Simulator, evaluate
from cells import append, command_line, finished, grouped, rows, simulations

TASKS = ("two_moons", "gaussian_linear", "slcp", "tune_poisson", "tune_narrow")


def settings() -> dict[str, Any]:
    """What is compared, beside NPE: options by name."""
    from sbi_jeffreys import FlowExpert, JeffreysOptions
    from sbi_jeffreys.proxies.experts import REGRESSIONS

    flows = (FlowExpert("maf", weight_decay=0.3, around_regression=True), FlowExpert("maf", 0.3))
    few = (*REGRESSIONS, *flows)
    return {
        "fast": JeffreysOptions.preset("fast"),
        "default": JeffreysOptions.preset("default"),
        "thorough": JeffreysOptions.preset("thorough"),
        "half the batch": JeffreysOptions(proxy_batch_size=256),
        "half the stage": JeffreysOptions(stage_length=0.5),
        "two flows": JeffreysOptions(experts=few),
        "half the batch, two flows": JeffreysOptions(experts=few, proxy_batch_size=256),
        "half the batch, no doubling": JeffreysOptions(proxy_batch_size=256, max_doublings=0),
    }


def train(task: Any, method: str, theta: torch.Tensor, x: torch.Tensor) -> Any:
    from sbi.inference import NPE

    from sbi_jeffreys import NPE_Jeffreys
    from sbi_jeffreys._sbi import NoTracker

    quiet = {"prior": task.prior, "show_progress_bars": False, "tracker": NoTracker()}
    if method == "npe":
        return NPE(density_estimator="nsf", **quiet).append_simulations(theta, x).train()
    inference = NPE_Jeffreys(options=settings()[method], **quiet)
    return inference.append_simulations(theta, x).train()


@torch.no_grad()
def reduced_chi_square(task: Any, estimator: Any) -> float:
    """Of curves: squared residuals of posterior draws in units of the noise; 1 where all is right.

    The median over 100 fresh observations of the mean over 50 draws.
    """
    torch.manual_seed(20_000)
    theta = task.prior.sample((100,))
    x = task.simulate(theta)
    drawn = estimator.sample(torch.Size((50,)), x)
    low, high = torch.tensor(task.bounds).T  # NPE's draws may be outside
    drawn = torch.maximum(torch.minimum(drawn, high), low)
    residuals = (x - task.signal(drawn)) / task.log_noise(drawn).exp()[..., None]
    return float(residuals.square().mean(dim=(0, 2)).median())


def run(arguments: argparse.Namespace) -> None:
    from sbi_jeffreys.benchmark.tasks import get_task
    from sbi_jeffreys.benchmark.tasks.tuning import TUNING_TASKS

    out = Path(arguments.out)
    done = finished(out)
    for seed in range(arguments.seeds):
        for name in arguments.tasks:
            for method in arguments.methods or ("npe", *settings()):
                cell = (name, arguments.simulations, seed, method)
                if cell in done:
                    continue
                task = TUNING_TASKS[name] if name in TUNING_TASKS else get_task(name)
                theta, x = simulations(task, arguments.simulations, seed)
                start = time.process_time()
                estimator = train(task, method, theta, x)
                took = time.process_time() - start
                result = evaluate(estimator, Simulator(task.prior, task.simulate))
                if hasattr(task, "signal"):
                    result["chi_square"] = reduced_chi_square(task, estimator)
                append(out, cell, {"seconds": took, **result})


def report(arguments: argparse.Namespace) -> None:
    cells = rows(Path(arguments.out))
    base = {tuple(cell["cell"][:3]): cell for cell in cells if cell["cell"][3] == "npe"}
    groups: dict[str, list[tuple[dict, dict]]] = defaultdict(list)
    for cell in cells:
        groups[cell["cell"][3]].append((cell, base[tuple(cell["cell"][:3])]))
    print("| setting | runs | time / NPE: median, most | NLL − NPE: mean, worst | coverage |")
    print("|" + "---|" * 5)
    for name, pairs in groups.items():
        ratios = [cell["seconds"] / npe["seconds"] for cell, npe in pairs]
        gains = [cell["nll"] - npe["nll"] for cell, npe in pairs]
        cover = [sum(c[f"coverage_{level}"] for c, _ in pairs) / len(pairs) for level in (50, 90)]
        print(
            f"| {name} | {len(pairs)} | {median(ratios):.1f}, {max(ratios):.1f} | "
            f"{sum(gains) / len(gains):+.3f}, {max(gains):+.3f} | {cover[0]:.2f} / {cover[1]:.2f} |"
        )
    print("\n| task | " + " | ".join(groups) + " |\n|" + "---|" * (len(groups) + 1))
    for task in dict.fromkeys(cell["cell"][0] for cell in cells):
        row = []
        for pairs in groups.values():
            own = [cell for cell, _ in pairs if cell["cell"][0] == task]
            nll = sum(cell["nll"] for cell in own) / max(1, len(own))
            row.append(f"{nll:.3f} ({sum(c['seconds'] for c in own) / max(1, len(own)):.0f} s)")
        print(f"| {task} | " + " | ".join(row) + " |")


def figure(arguments: argparse.Namespace) -> None:
    """Draw gain over NPE against processor time for the presets, a line for each task."""
    import matplotlib.pyplot as plt

    cells = rows(Path(arguments.out))
    plt.figure(figsize=(6, 4), layout="constrained")
    for task, of_task in grouped(cells).items():
        points, by_method = [], grouped(of_task, 3)
        for method in ("npe", "fast", "default", "thorough"):
            if own := by_method.get(method):
                points.append([mean(c[key] for c in own) for key in ("seconds", "nll")])
        times, values = torch.tensor(points).T
        plt.plot(times / times[0], values - values[0], "o-", label=task)
    plt.xscale("log")
    plt.xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    plt.minorticks_off()
    plt.xlabel("processor time of training / NPE's")
    plt.ylabel("held-out NLL − NPE's, nats")
    plt.title("NPE, then fast, default, thorough; 1,000 simulations")
    plt.legend(frameon=False)
    plt.savefig(Path(arguments.out).with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    command_line(
        __doc__,
        run,
        report,
        figure,
        tasks={"nargs": "+", "default": list(TASKS)},
        simulations={"type": int, "default": 1000},
        seeds={"type": int, "default": 2},
        methods={"nargs": "+", "help": "npe, or the name of a setting; all of them"},
    )

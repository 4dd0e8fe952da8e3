"""Is NPE_Jeffreys ever worse than NPE? Odd simulators, a few simulations, several seeds.

    python tests/attack_odd_simulators.py run OUT.jsonl --simulations 300 1000 --seeds 5
    python tests/attack_odd_simulators.py report OUT.jsonl

Sixteen simulators that nobody tuned to: heavy tails, counts, many zeros, a rare mode, chaos, x that
is independent of θ, no noise, a circle, censoring, 20 dimensions, rounding, five orders of
magnitude, the edge of the prior, ratios, a support that depends on θ, a curve. The same simulations
train sbi's NPE, plain NPE as `NPE_Jeffreys` keeps it (no symmetric stage), and `NPE_Jeffreys`. On
500 fresh pairs: mean negative log density, corrected for leakage, and coverage at 50 and 90 %.
Results are appended one line a cell, and cells that are there are skipped, so a run can be resumed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from cells import append, command_line, finished, rows, simulations
from sbi.inference import NPE
from sbi.utils import BoxUniform
from torch import Tensor
from torch.distributions import Distribution, Independent, LogNormal, MultivariateNormal

from sbi_jeffreys import JeffreysOptions, NPE_Jeffreys
from sbi_jeffreys._sbi import NoTracker

FRESH, DRAWS = 500, 200
METHODS = ("npe", "plain", "jeffreys")


class Simulator(NamedTuple):
    prior: Distribution
    simulate: Callable[[Tensor], Tensor]


def box(dim: int, low: float = -1.0, high: float = 1.0) -> Distribution:
    return BoxUniform(low * torch.ones(dim), high * torch.ones(dim))


def noise(like: Tensor, columns: int) -> Tensor:
    return torch.randn(len(like), columns)


def heavy_tails(theta: Tensor) -> Tensor:
    return theta @ torch.tensor(
        [[1.0, 0.5, 0.0], [0.0, -0.5, 1.0]]
    ) + 0.1 * torch.distributions.Cauchy(0.0, 1.0).sample((len(theta), 3))


def counts(theta: Tensor) -> Tensor:
    return torch.poisson((1.5 * theta @ torch.tensor([[1.0, 0.5, -0.5], [0.0, 1.0, 1.0]])).exp())


def zero_inflated(theta: Tensor) -> Tensor:
    alive = torch.rand(len(theta), 4) < torch.sigmoid(2 * theta[:, :1])
    return alive * (theta[:, 1:] + 0.5 * noise(theta, 4)).exp()


def rare_mode(theta: Tensor) -> Tensor:
    sign = torch.where(torch.rand(len(theta), 1) < 0.05, -1.0, 1.0)
    return sign * theta + 0.1 * noise(theta, 2)


def chaotic(theta: Tensor) -> Tensor:
    rate, state, seen = 3.6 + 0.4 * theta[:, 0], 0.2 + 0.6 * theta[:, 1], []
    for _ in range(20):
        state = rate * state * (1 - state)
        seen.append(state)
    return torch.stack(seen[-6:], dim=1) + 0.02 * noise(theta, 6)


def independent(theta: Tensor) -> Tensor:
    return noise(theta, 3)


def deterministic(theta: Tensor) -> Tensor:
    return torch.stack([theta[:, 0] + theta[:, 1] ** 2, theta[:, 0] * theta[:, 1]], dim=1)


def circular(theta: Tensor) -> Tensor:
    return torch.cat([theta.cos(), theta.sin()], dim=1) + 0.1 * noise(theta, 2)


def censored(theta: Tensor) -> Tensor:
    return (theta.repeat(1, 2) + 0.2 * noise(theta, 4)).clamp_min(0.0)


def twenty_dimensions(theta: Tensor) -> Tensor:
    return theta.cumsum(dim=1) / 3 + 0.3 * noise(theta, 20)


def rounded(theta: Tensor) -> Tensor:
    return ((theta.repeat(1, 2) + 0.1 * noise(theta, 4)) * 4).round() / 4


def orders_of_magnitude(theta: Tensor) -> Tensor:
    return (6 * theta[:, :1] + 0.5 * noise(theta, 3) * theta[:, 1:].exp()).exp()


def at_the_edge(theta: Tensor) -> Tensor:
    return theta.sign() * theta.abs().pow(0.1) + 0.05 * noise(theta, 2)


def ratio(theta: Tensor) -> Tensor:
    return torch.stack([theta[:, 0] / theta[:, 1], theta[:, 1] / theta[:, 0]], 1) * (
        1 + 0.1 * noise(theta, 2)
    )


def moving_support(theta: Tensor) -> Tensor:
    drawn = theta * torch.rand(len(theta), 5)
    return torch.stack([drawn.amax(dim=1), drawn.mean(dim=1)], dim=1)


def curve(theta: Tensor) -> Tensor:
    times = torch.linspace(0, 1, 80)
    shape = torch.sin(6 * times + 2 * theta[:, 1:2]) * (-times * theta[:, 2:].exp()).exp()
    return (1.5 + theta[:, :1]) * shape + 0.15 * noise(theta, 80)


def lognormal(dim: int) -> Distribution:
    return Independent(LogNormal(torch.zeros(dim), 0.7 * torch.ones(dim)), 1)


SIMULATORS = {
    "heavy_tails": Simulator(box(2), heavy_tails),
    "counts": Simulator(box(2), counts),
    "zero_inflated": Simulator(box(2), zero_inflated),
    "rare_mode": Simulator(box(2), rare_mode),
    "chaotic": Simulator(box(2, 0.0), chaotic),
    "independent": Simulator(box(2), independent),
    "deterministic": Simulator(box(2), deterministic),
    "circular": Simulator(box(1, -math.pi, math.pi), circular),
    "censored": Simulator(box(2), censored),
    "twenty_dimensions": Simulator(
        MultivariateNormal(torch.zeros(20), 0.5 * torch.eye(20) + 0.5), twenty_dimensions
    ),
    "rounded": Simulator(box(2), rounded),
    "orders_of_magnitude": Simulator(box(2), orders_of_magnitude),
    "at_the_edge": Simulator(box(2), at_the_edge),
    "ratio": Simulator(lognormal(2), ratio),
    "moving_support": Simulator(lognormal(1), moving_support),
    "curve": Simulator(box(3), curve),
}


def train(method: str, prior: Distribution, theta: Tensor, x: Tensor):
    """The density estimator and what became of it, in words."""
    quiet = {"prior": prior, "show_progress_bars": False, "tracker": NoTracker()}
    if method == "npe":
        return NPE(density_estimator="nsf", **quiet).append_simulations(theta, x).train(), ""
    options = JeffreysOptions(num_steps=0) if method == "plain" else JeffreysOptions()
    inference = NPE_Jeffreys(options=options, **quiet)
    estimator = inference.append_simulations(theta, x).train()
    return estimator, str(inference.training_report)


@torch.no_grad()
def evaluate(estimator, simulator: Simulator) -> dict[str, float]:
    """NLL and coverage on fresh pairs, with the mass outside the prior cut off."""
    torch.manual_seed(10_000)
    theta = simulator.prior.sample((FRESH,))
    x = simulator.simulate(theta)
    losses, ranks = [], []
    for own, at in zip(theta.split(50), x.split(50)):
        drawn = estimator.sample(torch.Size((DRAWS,)), at)
        inside = simulator.prior.support.check(drawn)  # type: ignore[union-attr]
        log_q = estimator.log_prob(torch.cat([own.unsqueeze(0), drawn]), at)
        share = inside.float().mean(dim=0).clamp_min(1 / DRAWS)
        losses.append(-log_q[0] + share.log())
        denser = (inside & (log_q[1:] > log_q[0])).float().sum(0)
        ranks.append(denser / inside.float().sum(0).clamp_min(1))
    loss, rank = torch.cat(losses).double(), torch.cat(ranks)
    return {
        "nll": float(loss.mean()),
        "nll_median": float(loss.median()),
        "coverage_50": float((rank < 0.5).float().mean()),
        "coverage_90": float((rank < 0.9).float().mean()),
    }


def run(arguments: argparse.Namespace) -> None:
    out = Path(arguments.out)
    done = finished(out)
    for seed in range(arguments.seeds):
        for num in arguments.simulations:
            for name, simulator in SIMULATORS.items():
                for method in arguments.methods:
                    cell = (name, num, seed, method)
                    if cell in done or (arguments.only and name not in arguments.only):
                        continue
                    theta, x = simulations(simulator, num, seed)
                    start = time.process_time()
                    try:
                        estimator, words = train(method, simulator.prior, theta, x)
                        took = time.process_time() - start
                        result = {**evaluate(estimator, simulator), "words": words}
                    except Exception as error:
                        took, result = math.nan, {"error": f"{type(error).__name__}: {error}"}
                    append(out, cell, {"seconds": took, **result})
                    print(*cell, {k: v for k, v in result.items() if k != "words"}, flush=True)


def report(arguments: argparse.Namespace) -> None:
    cells = rows(Path(arguments.out))
    found = {tuple(cell["cell"]): cell for cell in cells}
    groups: dict[tuple, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for (name, num, seed, method), cell in found.items():
        base = found.get((name, num, seed, "npe"))
        if method != "npe" and base is not None and "nll" in cell and "nll" in base:
            groups[num, name][method].append((cell, base))
    print(
        "| simulations | simulator | seeds | NPE | plain − NPE | ours − NPE | worst seed |", end=""
    )
    print(" coverage 50 / 90 %: NPE | ours |\n|" + "---|" * 9)
    for (num, name), methods in sorted(groups.items()):
        words = {}
        for method, pairs in methods.items():
            gaps = torch.tensor([cell["nll"] - base["nll"] for cell, base in pairs])
            error = float(gaps.std() / math.sqrt(len(gaps))) if len(gaps) > 1 else math.nan
            worse = float(gaps.mean()) > 2 * error
            mark = " **worse**" if worse else ""
            spread = "" if math.isnan(error) else f" ± {error:.3f}"  # of one seed
            words[method] = f"{float(gaps.mean()):+.3f}{spread}{mark}"
            words[f"{method} worst"] = f"{float(gaps.max()):+.2f}"
        pairs = methods.get("jeffreys", [])
        if not pairs:
            continue
        npe = sum(base["nll"] for _, base in pairs) / len(pairs)

        def coverage(which: int, level: int, pairs: list = pairs) -> str:
            return f"{sum(pair[which][f'coverage_{level}'] for pair in pairs) / len(pairs):.2f}"

        print(
            f"| {num} | {name} | {len(pairs)} | {npe:.2f} | {words.get('plain', '–')} | "
            f"{words['jeffreys']} | {words['jeffreys worst']} | "
            f"{coverage(1, 50)} / {coverage(1, 90)} | {coverage(0, 50)} / {coverage(0, 90)} |"
        )
    for cell in cells:
        if "error" in cell:
            print(cell["cell"], cell["error"])


if __name__ == "__main__":
    command_line(
        __doc__,
        run,
        report,
        simulations={"type": int, "nargs": "+", "default": [300, 1000]},
        seeds={"type": int, "default": 5},
        methods={"nargs": "+", "default": METHODS, "choices": METHODS},
        only={"nargs": "*", "default": ()},
    )

"""A neuron of eight parameters and nine statistics: does the main keep up with its proxy there?

    python tests/attack_neuron.py run OUT.jsonl --simulations 1000 --seeds 2
    python tests/attack_neuron.py report OUT.jsonl

Hodgkin–Huxley equations with a slow potassium current and noise (Pospischil et al. 2008; the prior
of Gonçalves et al. 2020), a step of current, and statistics of the voltage. There is no likelihood.
NPE and `NPE_Jeffreys` are trained on the same simulations; measured on 500 fresh pairs are the
negative log density and coverage at 50 and 90 %, of the proxy on 100 pairs by long importance
sampling, beside the main's density on the same pairs. Cells that are in the file are skipped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from attack_odd_simulators import Simulator, evaluate
from cells import append, command_line, finished, grouped, rows, simulations
from sbi.utils import BoxUniform
from torch import Tensor

NAMES = ("g_Na", "g_K", "g_leak", "g_M", "tau_max", "V_T", "noise", "E_leak")
LOW = torch.tensor([0.5, 1e-4, 1e-4, 1e-4, 50.0, -90.0, 1e-4, -100.0])
HIGH = torch.tensor([80.0, 15.0, 0.6, 0.6, 3000.0, -40.0, 0.15, -35.0])
PRIOR = BoxUniform(LOW, HIGH)
STEP, DURATION, ON, OFF = 0.05, 120.0, 10.0, 100.0  # ms
E_NA, E_K, CURRENT, CAPACITY = 53.0, -107.0, 4.0, 1.0  # mV, mV, µA/cm², µF/cm²
DRAWS = 1024  # of the main, for the proxy's normaliser


def rate(x: Tensor, scale: float) -> Tensor:
    """x / (exp(x / scale) − 1), which is `scale` at 0."""
    x = torch.where(x.abs() < 1e-4, 1e-4, x)
    return x / torch.expm1((x / scale).clamp(max=80.0))


def gates(v: Tensor, v_t: Tensor, tau_max: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Steady state and time constant of m, h, n and p."""
    u = v - v_t
    alphas = 0.32 * rate(13 - u, 4.0), 0.128 * torch.exp((17 - u) / 18), 0.032 * rate(15 - u, 5.0)
    betas = (
        0.28 * rate(u - 40, 5.0),
        4 / (1 + torch.exp((40 - u) / 5)),
        0.5 * torch.exp((10 - u) / 40),
    )
    found = [(a / (a + b), 1 / (a + b)) for a, b in zip(alphas, betas)]
    slow = tau_max / (3.3 * torch.exp((v + 35) / 20) + torch.exp(-(v + 35) / 20))
    return [*found, (torch.sigmoid((v + 35) / 10), slow)]


def voltages(theta: Tensor) -> Tensor:
    """Membrane potential in mV, shape `(N, steps)`; exponential Euler."""
    g_na, g_k, g_leak, g_m, tau_max, v_t, noise, e_leak = theta.double().unbind(1)
    v = e_leak.clone()
    state = [steady for steady, _ in gates(v, v_t, tau_max)]
    trace = []
    for step in range(round(DURATION / STEP)):
        for k, (steady, tau) in enumerate(gates(v, v_t, tau_max)):
            state[k] = steady + (state[k] - steady) * torch.exp(-STEP / tau)
        m, h, n, p = state
        sodium, potassium = g_na * m**3 * h, g_k * n**4 + g_m * p
        total = sodium + potassium + g_leak
        drive = sodium * E_NA + potassium * E_K + g_leak * e_leak
        drive = drive + (CURRENT if ON <= step * STEP < OFF else 0.0)
        drive = drive + noise * torch.randn_like(v) / STEP**0.5
        v = drive / total + (v - drive / total) * torch.exp(-STEP * total / CAPACITY)
        trace.append(v)
    return torch.stack(trace, dim=1)


def simulate(theta: Tensor) -> Tensor:
    """Nine statistics: spikes, rest (mean, log std), stimulus (mean, log std, skewness, kurtosis),
    latency of the first spike, lowest potential after the onset."""
    v = voltages(theta)
    on, off = round(ON / STEP), round(OFF / STEP)
    rest, stimulus = v[:, on // 2 : on], v[:, on:off]
    up = (stimulus[:, 1:] > -10) & (stimulus[:, :-1] <= -10)
    latency = torch.where(up.any(1), up.double().argmax(1), up.shape[1]) * STEP
    centred = stimulus - stimulus.mean(1, keepdim=True)
    std = centred.std(1).clamp_min(1e-6)
    moments = [(centred**k).mean(1) / std**k for k in (3, 4)]
    logs = rest.std(1).clamp_min(1e-6).log(), std.log()
    columns = [up.sum(1), rest.mean(1), logs[0], stimulus.mean(1), logs[1], *moments]
    return torch.stack([*columns, latency, stimulus.amin(1)], dim=1).float()


@torch.no_grad()
def of_proxy(proxy: Any, main: Any, theta: Tensor, x: Tensor) -> dict[str, float]:
    """The proxy's negative log density, pessimistic, and its coverage, by importance sampling.

    Beside them the main's negative log density on the same pairs.
    """
    from sbi_jeffreys.proxies.normaliser import adapted_draws

    losses, ranks = [], []
    gamma = proxy.inverse_temperature
    for own, at in zip(theta.split(10), x.split(10)):
        draws = adapted_draws(proxy, main, own, at, DRAWS)
        log_q = draws.log_potential(gamma)
        weights = torch.softmax(draws.log_weights(gamma)[1:], dim=0)
        ranks.append((weights * (log_q[1:] > log_q[0])).sum(0))
        losses.append(draws.log_normaliser(gamma).pessimistic - log_q[0])
    rank = torch.cat(ranks)
    return {
        "proxy_nll": float(torch.cat(losses).mean()),
        "main_nll_there": float(-main.log_prob(theta.unsqueeze(0), x).mean()),
        "proxy_coverage_50": float((rank < 0.5).float().mean()),
        "proxy_coverage_90": float((rank < 0.9).float().mean()),
    }


def run(arguments: argparse.Namespace) -> None:
    from sbi.inference import NPE

    from sbi_jeffreys import JeffreysOptions, NPE_Jeffreys
    from sbi_jeffreys._sbi import NoTracker

    out, simulator = Path(arguments.out), Simulator(PRIOR, simulate)
    done = finished(out)
    for seed in range(arguments.seeds):
        for method in arguments.methods:
            cell = ("neuron", arguments.simulations, seed, method)
            if cell in done:
                continue
            theta, x = simulations(simulator, arguments.simulations, seed)
            quiet = {"prior": PRIOR, "show_progress_bars": False, "tracker": NoTracker()}
            start = time.process_time()
            if method == "npe":
                main = NPE(density_estimator="nsf", **quiet).append_simulations(theta, x).train()
                took, more = time.process_time() - start, {}
            else:
                preset = method.removeprefix("jeffreys").strip("_") or "default"
                options = JeffreysOptions.preset(preset)  # type: ignore[arg-type]
                inference = NPE_Jeffreys(options=options, **quiet)
                main = inference.append_simulations(theta, x).train()
                took = time.process_time() - start
                torch.manual_seed(10_000)
                fresh = PRIOR.sample((100,))
                more = of_proxy(inference.proxy, main, fresh, simulate(fresh))
                more["words"] = str(inference.training_report)
            result = {"seconds": took, **evaluate(main, simulator), **more}
            append(out, cell, result)
            print(*cell, result, flush=True)


def report(arguments: argparse.Namespace) -> None:
    cells = rows(Path(arguments.out))
    keys = ("nll", "coverage_50", "coverage_90", "proxy_nll", "main_nll_there")
    keys += ("proxy_coverage_50", "proxy_coverage_90", "seconds")
    print("| method | runs | " + " | ".join(keys) + " |\n|" + "---|" * (2 + len(keys)))
    for method, own in grouped(cells, 3).items():
        values = [
            f"{mean(cell[key] for cell in own):.2f}" if all(key in cell for cell in own) else "–"
            for key in keys
        ]
        print(f"| {method} | {len(own)} | " + " | ".join(values) + " |")


if __name__ == "__main__":
    command_line(
        __doc__,
        run,
        report,
        simulations={"type": int, "default": 1000},
        seeds={"type": int, "default": 2},
        methods={"nargs": "+", "default": ["npe", "jeffreys"]},
    )

"""Compare NPE and NPE_Jeffreys on simulations of your own, from a NumPy .npz file.

FILE.npz has `theta` (N, D) and `x` (N, K), and optionally `x_o` (K,), an observation, and `low` and
`high` (D,), the bounds of a uniform prior; without bounds no prior is used. Both methods see the
same training and validation simulations, and are judged by the same held-out ones. Prints a table,
the verdict on each, and what training decided; writes `coverage.png` and, with x_o,
`posteriors.png`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sbi_jeffreys import NPE_Jeffreys, plots
from sbi_jeffreys._sbi import network_of
from sbi_jeffreys.benchmark._arguments import add_common, positive_int, seed_number
from sbi_jeffreys.benchmark._running import CommandError, derive_seed, quiet, say, seeded
from sbi_jeffreys.benchmark.cells import check_folder
from sbi_jeffreys.benchmark.entries import warm_up
from sbi_jeffreys.benchmark.figures import saved
from sbi_jeffreys.benchmark.methods import FitContext
from sbi_jeffreys.benchmark.simulation_file import MIN_SIMULATIONS, SimulationFile, read_simulations
from sbi_jeffreys.benchmark.tables import plain, shown
from sbi_jeffreys.diagnostics.calibration import mean_and_error
from sbi_jeffreys.diagnostics.report import HeldOutReport, held_out_report

_MIN_SHARE = MIN_SIMULATIONS // 2  # of simulations to train on, and of pairs to judge by
_MAX_HELD_OUT = 500
_POSTERIOR_DRAWS, _MAX_SECONDS = 1_000, 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("file", type=Path, metavar="FILE.npz", help="theta, x; x_o; low, high")
    text = f"simulations that neither method sees (default: a fifth, {_MIN_SHARE} to 500)"
    parser.add_argument("--held-out", type=positive_int(_MIN_SHARE), default=None, help=text)
    text = "of everything random (default: 0)"
    parser.add_argument("--seed", type=seed_number, default=0, help=text)
    text = "folder of the figures (default: outputs)"
    parser.add_argument("--out", type=Path, default=Path("outputs"), help=text)
    add_common(parser)


@dataclass
class _Trained:
    """A trained method, what it cost, and how it does on the held-out pairs."""

    inference: Any
    seconds: float
    report: HeldOutReport
    losses: Tensor


def run(args: argparse.Namespace) -> int:
    """Read, train, judge, print and draw; the exit code."""
    try:
        data = read_simulations(args.file)
        held_out, kept = _split(len(data.theta), args.held_out, args.seed)
    except ValueError as error:
        raise CommandError(str(error)) from error
    check_folder(args.out)
    print(_describe(args.file, data, len(kept), len(held_out)))
    trained = train_both(data, kept, held_out, args)
    print(
        f"\n{plain(_rows(trained))}\nby chance: where the coverage of an exact posterior is, 99 %"
    )
    print(f"\nNPE_Jeffreys minus NPE, pair by pair: {_difference(trained)} nats of NLL")
    for name, one in trained.items():
        print(f"\nVerdict on {name}:")
        print("\n".join(f"  - {sentence}" for sentence in one.report.verdict))
    report = trained["NPE_Jeffreys"].inference.training_report
    print(f"\nWhat NPE_Jeffreys decided in training:\n{report}")
    figures = write_figures(data, trained, args.out, args.seed)
    print(f"\nFigures: {', '.join(map(str, figures))}")
    return 0


def _split(num: int, held_out: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Rows that neither method sees, and rows to train on."""
    size = min(max(_MIN_SHARE, num // 5), _MAX_HELD_OUT) if held_out is None else held_out
    if num - size < _MIN_SHARE:
        raise ValueError(
            f"held-out: expected at most {num - _MIN_SHARE} of the {num} simulations, so that "
            f"{_MIN_SHARE} are left to train on, got {size}; lower --held-out, or run more "
            "simulations."
        )
    with seeded(derive_seed("held out", seed)):
        order = torch.randperm(num)
    return order[:size], order[size:]


def _describe(path: Path, data: SimulationFile, num_training: int, num_held_out: int) -> str:
    """What is compared, in two or three lines."""
    num, dim = data.theta.shape
    lines = [
        f"{path}: {num} simulations, {_counted(dim, 'parameter')}, "
        f"{_counted(data.x.shape[1], 'output')}; {num_training} "
        f"to train on, {num_held_out} held out",
        "Prior: uniform between low and high."
        if data.bounds
        else "Prior: the file has no low and high, so no prior is used: NPE has none, and "
        "NPE_Jeffreys takes the empirical prior of theta.",
    ]
    if data.x_o is None:
        lines.append("The file has no x_o, so no posterior is drawn.")
    if data.unused:
        lines.append(f"Keys that are not used: {', '.join(data.unused)}.")
    return "\n".join(lines)


def _counted(num: int, what: str) -> str:
    return f"{num} {what}{'' if num == 1 else 's'}"


def train_both(
    data: SimulationFile, kept: Tensor, held_out: Tensor, args: argparse.Namespace
) -> dict[str, _Trained]:
    """Train NPE and NPE_Jeffreys on the same rows, and judge both by the same held-out rows."""
    from sbi.inference import NPE
    from sbi.utils import BoxUniform

    context = FitContext(show_progress=not args.quiet, fast=args.fast)
    prior = None if data.bounds is None else BoxUniform(*data.bounds)
    seed = derive_seed("training", args.seed)
    with seeded(seed):  # NPE_Jeffreys takes the seed of its own stream from torch's
        stream = int(torch.randint(2**31, (1,)))
    makers = {
        "NPE": (lambda: NPE(prior, "nsf", **context.trainer_kwargs), stream),
        "NPE_Jeffreys": (
            lambda: NPE_Jeffreys(prior, options=context.options(), **context.trainer_kwargs),
            seed,
        ),
    }
    found: dict[str, _Trained] = {}
    if not args.fast:
        with quiet():  # so that imports and first calls are not charged to the first method
            warm_up()
    for name, (make, start) in makers.items():
        say(f"{name}: training …", args.quiet)
        with quiet(args.quiet, ours=True):
            inference = make()
            inference.append_simulations(data.theta[kept], data.x[kept])
            begun = time.perf_counter()
            with seeded(start):  # the same split into training and validation simulations
                inference.train(**context.train_kwargs)
            seconds = time.perf_counter() - begun
            found[name] = _judged(inference, seconds, data, held_out, args)
    return found


def _judged(
    inference: Any, seconds: float, data: SimulationFile, held_out: Tensor, args: Any
) -> _Trained:
    theta, x = data.theta[held_out], data.x[held_out]
    with seeded(derive_seed("report", args.seed)), torch.no_grad():
        report = held_out_report(inference, theta, x, show_progress_bars=not args.quiet)
        network = network_of(inference)
        assert network is not None
        losses = -network.log_prob(theta[None], x)[0]
    return _Trained(inference, seconds, report, losses)


def _difference(trained: Mapping[str, _Trained]) -> str:
    """The mean difference of held-out losses with its standard error."""
    return _pm(*mean_and_error(trained["NPE_Jeffreys"].losses - trained["NPE"].losses))


def _rows(trained: Mapping[str, _Trained]) -> list[list[str]]:
    """The held-out reports side by side, one column for each method, header first."""
    rows = [["on held-out simulations", *trained]]
    measures = {
        "NLL, nats (lower is better)": lambda one: _pm(
            one.report.forward, one.report.forward_error
        ),
        "coverage of 50 % regions": lambda one: _coverage(one.report, 0.5),
        "coverage of 90 % regions": lambda one: _coverage(one.report, 0.9),
        "mass outside the prior": lambda one: f"{100 * one.report.leakage:.1f} %",
        "reverse KL to the proxy, nats": lambda one: shown(one.report.reverse, ".3f"),
        "training time, s": lambda one: f"{one.seconds:.1f}",
    }
    return rows + [
        [title, *(measure(one) for one in trained.values())] for title, measure in measures.items()
    ]


def _pm(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}"


def _coverage(report: HeldOutReport, level: float) -> str:
    """Coverage at a level, with the interval in which an exact posterior's lies."""
    curve = report.coverage
    k = int((curve.levels - level).abs().argmin())
    value, low, high = (float(part[k]) for part in (curve.values, curve.lower, curve.upper))
    return f"{value:.2f} (by chance {low:.2f}–{high:.2f})"


def write_figures(
    data: SimulationFile, trained: Mapping[str, _Trained], out: Path, seed: int
) -> list[Path]:
    """Coverage of both methods and, where there is an observation, both posteriors there."""
    reports = {name: one.report for name, one in trained.items()}
    written = [saved(out / "coverage.png", lambda: plots.plot_coverage(reports).figure)]
    path = out / "posteriors.png"
    path.unlink(missing_ok=True)  # of another file, perhaps
    if data.x_o is None:
        return written
    samples: dict[str, Tensor] = {}
    for name, one in trained.items():
        with seeded(derive_seed("posterior", seed)):
            drawn = _draws(one.inference, data.x_o)
        if isinstance(drawn, str):
            print(f"\n{name} is left out of posteriors.png: {drawn}.")
        else:
            samples[name] = drawn
    if not samples:
        return written

    def draw() -> Any:
        return plots.plot_posteriors(samples).flat[0].figure

    return [*written, saved(path, draw)]


def _draws(inference: Any, x_o: Tensor) -> Tensor | str:
    """Draws `(S, D)` of a posterior, or why there are none."""
    with quiet(ours=True):
        posterior = inference.build_posterior()
        try:
            return posterior.sample(
                (_POSTERIOR_DRAWS,),
                x=x_o[None],
                show_progress_bars=False,
                max_sampling_time=_MAX_SECONDS,
            ).detach()
        except RuntimeError as error:
            if "max_sampling_time" not in str(error):
                raise
            return (
                "so much of its posterior at x_o is outside the prior that "
                f"{_POSTERIOR_DRAWS} draws took over {_MAX_SECONDS:.0f} s"
            )
        except AssertionError:  # of nflows' spline
            # mutant: no-draws-far-away
            return (
                "its network cannot be drawn from at x_o, which is far from all simulations; ask "
                "misspecification_test() of NPE_Jeffreys whether the simulator can produce it"
            )

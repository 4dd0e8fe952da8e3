"""Ablation: what each part of the symmetric stage contributes, and what a broken proxy does.

A row is a task and a condition of its proxy. Per row and seed, stage 0 and the proxy are trained
once; every variant runs the symmetric stage from there. Two promises are checked per row: adaptive
weights are not worse than the best frozen ones, and not worse than plain NPE.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sbi_jeffreys.benchmark import _arguments
from sbi_jeffreys.benchmark._running import derive_seed, measured, seeded
from sbi_jeffreys.benchmark.cells import Number, study_check
from sbi_jeffreys.benchmark.entries import run_study
from sbi_jeffreys.benchmark.evaluation import (
    EvaluationSettings,
    evaluate,
    pair_metrics,
    simulations_for,
)
from sbi_jeffreys.benchmark.fitted import EstimatorFit
from sbi_jeffreys.benchmark.methods import FitContext
from sbi_jeffreys.benchmark.statistics import (
    Difference,
    Methods,
    nest,
    paired_difference,
    summarise,
)
from sbi_jeffreys.benchmark.tables import markdown, shown, values_table, write_study_page
from sbi_jeffreys.benchmark.tasks import TASKS, Task, get_task
from sbi_jeffreys.benchmark.variants import CONDITIONS, VARIANTS, ForkableNPE, Variant
from sbi_jeffreys.training.multipliers import trust
from sbi_jeffreys.training.report import ProxyStatus

_STUDY = "ablation"
_NPE, _ADAPTIVE = "npe", "adaptive"
_FROZEN = tuple(name for name in VARIANTS if name.startswith("frozen"))
_LABELS = {_NPE: "NPE (stage 0)", **{name: variant.label for name, variant in VARIANTS.items()}}
_DEFAULT_TASKS = "gaussian_linear,two_moons,slcp,sir"
#: Broken proxies that a bare task name includes.
_BROKEN = {"two_moons": ("shuffled", "undertrained"), "sir": ("raw",)}
_SETTINGS = EvaluationSettings(
    observations=3,
    observation_seed=3,  # another one than the reported benchmark's
    num_samples=1000,
    classifier="rf",
    test_pairs=2000,
    draws_per_pair=50,
)
_COLUMNS = {
    "nll": ("NLL", 3),
    "kl_reverse": ("reverse KL + const.", 3),
    "jeffreys": ("Jeffreys", 2),
    "coverage_90": ("cov. 90 %", 3),
    "c2st": ("C2ST", 3),
    "multiplier": ("last λ", 2),
    "cpu_seconds": ("cpu s", 1),
}
#: The metrics for which the promises are checked; less is better.
_PROMISED = {
    "nll": "NLL",
    "jeffreys": "Jeffreys",
    "coverage_error_90": "coverage error",
    "c2st": "C2ST",
}
_STATUS = re.compile("|".join(ProxyStatus.__members__))
#: What a record must hold; records of earlier versions have variants that no longer exist.
CHECK = study_check(
    _STUDY,
    {
        "row": re.compile(rf"\w+:({'|'.join(CONDITIONS)})"),
        "simulations": re.compile(r"n\d+"),
        "seed": re.compile(r"s\d+"),
    },
    {
        "variants": {"*": {"metrics": {"*": Number()}, "training": {"*": Number()}}},
        "proxy": {"held_out": Number(), "trust": Number(nullable=False), "status?": _STATUS},
    },
)

RowKey = tuple[str, str]  # task and condition of the proxy; budget


@dataclass(frozen=True)
class Row:
    """A task and a condition of its proxy."""

    task: str
    condition: str = "good"

    @property
    def variants(self) -> dict[str, Variant]:
        """The variants that run in this row."""
        good = self.condition == "good"
        return {name: v for name, v in VARIANTS.items() if good or v.broken_rows}


def row_list(text: str) -> list[Row]:
    """Rows, comma-separated: `task` for all rows of a task, `task:proxy` for one of them.

    Raises:
        argparse.ArgumentTypeError: If there is no such row; the message lists the known ones.
    """
    rows: list[Row] = []
    for item in _arguments.items(text):
        task, colon, condition = item.partition(":")
        if task not in TASKS or (colon and condition not in CONDITIONS):
            raise argparse.ArgumentTypeError(
                f"expected tasks ({', '.join(sorted(TASKS))}) or rows task:proxy with proxy one of "
                f"{', '.join(CONDITIONS)}, comma-separated; got {item!r}"
            )
        names = (condition,) if colon else ("good", *_BROKEN.get(task, ()))
        rows += [Row(task, name) for name in names]
    return list(dict.fromkeys(rows))


# ------------------------------------------------------------------ measuring


def measure_row(
    context: FitContext,
    task: Task,
    row: Row,
    simulations: int,
    seed: int,
    settings: EvaluationSettings,
    with_c2st: bool,
) -> dict[str, Any]:
    """Train stage 0 and the proxy of a row, run all its variants from there, measure each.

    Returns:
        `results`, with `variants`: per name `metrics` and `training`; `proxy`: its held-out value,
        trust, status and cost. Variants whose symmetric stage ran have a `multiplier`.
    """

    def measure(trainer: ForkableNPE, cpu_seconds: float) -> dict[str, Any]:
        fitted = EstimatorFit(posteriors=[trainer.build_posterior()])
        if with_c2st:
            metrics = evaluate(task, fitted, settings, seed).metrics
        else:
            metrics = pair_metrics(task, fitted, settings, seed)
        training: dict[str, Any] = {"cpu_seconds": cpu_seconds}
        if trainer.summary["multiplier"]:
            training |= {key: trainer.summary[key][-1] for key in ("multiplier", "trust")}
        return {"metrics": metrics, "training": training}

    theta, x = simulations_for(task, simulations, seed)
    with seeded(derive_seed("training", task.name, simulations, seed)):
        trainer = ForkableNPE(task.prior, **context.trainer_kwargs)
        with measured() as cost:
            trainer.append_simulations(theta, x).train(**context.train_kwargs)
    options = context.options()
    options = replace(options, proxy=CONDITIONS[row.condition].build(task.prior, options))
    results = {_NPE: measure(trainer, cost.cpu_seconds)}
    with measured() as fit_cost:  # one step, which fits the proxy that all variants share
        first = trainer.fork(replace(options, num_steps=1, adaptive=True))
    for name, variant in row.variants.items():
        with measured() as cost:
            fork = trainer.fork(replace(options, **variant.changes), variant.edit)
        results[name] = measure(fork, cost.cpu_seconds)
    held_out, report = first.summary["proxy_held_out"][-1], first.training_report
    assert report is not None
    proxy = {
        "held_out": held_out,
        "note": first.summary["proxy"][-1],
        "status": report.proxy_status.name,
        "trust": float(trust(held_out, trainer.summary["best_validation_loss"][-1])),
        "cpu_seconds": fit_cost.cpu_seconds,
    }
    return {"results": {"variants": results, "proxy": proxy}}


# ------------------------------------------------------------------ the table


def tabulate(records: Iterable[Mapping[str, Any]]) -> dict[RowKey, Methods]:
    """Values of all records by row and budget, variant and seed, with the coverage error."""
    return nest(
        (
            _row(record),
            name,
            int(record["key"]["seed"].removeprefix("s")),
            {**entry["metrics"], **entry["training"]},
        )
        for record in records
        for name, entry in record["results"]["variants"].items()
    )


def _row(record: Mapping[str, Any]) -> RowKey:
    return record["key"]["row"], record["key"]["simulations"]


def best_frozen(row: Methods, metric: str) -> str | None:
    """The frozen weighting with the lowest mean, chosen after the fact, per metric."""
    means = {name: summarise(row.get(name, {}), metric) for name in _FROZEN}
    known = {name: summary.mean for name, summary in means.items() if summary is not None}
    return min(known, key=lambda name: known[name]) if known else None


def gap(row: Methods, other: str | None, metric: str) -> Difference | None:
    """Adaptive minus `other` over the seeds where one of them ran its symmetric stage."""
    adaptive, found = row.get(_ADAPTIVE, {}), row.get(other or "", {})
    ran = {s for seeds in (adaptive, found) for s, entry in seeds.items() if "multiplier" in entry}
    return paired_difference({s: adaptive[s] for s in ran & adaptive.keys()}, found, metric)


def verdict(row: Methods, other: str | None, metric: str) -> str:
    """Whether adaptive is not worse than `other`, for a metric of which less is better.

    Returns:
        "holds": not worse in the mean; "within noise": worse by at most twice the standard error
        of the paired difference; "BROKEN": worse by more; "worse, one seed": the standard error is
        not known; "–": not measured, or both are plain NPE because the proxy was refused.
    """
    if (found := gap(row, other, metric)) is None:
        return "–"
    if found.mean <= 0:
        return "holds"
    if found.count == 1:
        return "worse, one seed"
    return "within noise" if found.mean <= 2 * found.standard_error else "BROKEN"


def _row_text(key: RowKey, row: Methods, notes: list[str]) -> str:
    """Both tables of one row, and its verdicts."""
    gaps = [["adaptive minus", "best frozen", "verdict", "NPE", "verdict"]]
    for metric, title in _PROMISED.items():
        if (best := best_frozen(row, metric)) is None:
            continue
        cells = [title]
        for other in (best, _NPE):
            found = gap(row, other, metric)
            named = f" ({_LABELS[best].removeprefix('frozen, ')})"
            text = shown(found) + (named if found and other == best else "")
            cells += [text, verdict(row, other, metric)]
        gaps.append(cells)
    task, _, condition = key[0].partition(":")
    head = f"## {task}, proxy {CONDITIONS[condition].label}, {key[1][1:]} simulations"
    values = values_table(row, _LABELS, _COLUMNS, "variant")
    return "\n\n".join([head, "\n".join(notes), values, markdown(gaps)])


def _summary(table: Mapping[RowKey, Methods]) -> str:
    """One line per row and promise."""
    rows = [["row", *(f"{title}: frozen / NPE" for title in _PROMISED.values())]]
    for (name, budget), row in sorted(table.items()):
        verdicts = [
            f"{verdict(row, best_frozen(row, metric), metric)} / {verdict(row, _NPE, metric)}"
            for metric in _PROMISED
        ]
        rows.append([f"{name}, {budget[1:]}", *verdicts])
    return markdown(rows)


def _note(record: Mapping[str, Any]) -> str:
    """Held-out value and trust of the proxy of one seed, or why it was refused."""
    proxy = record["results"]["proxy"]
    value = "not finite" if proxy["held_out"] is None else f"{proxy['held_out']:.3f}"
    status = ProxyStatus[proxy.get("status", "USED")]  # which earlier versions did not record
    outcome = status.value if status is not ProxyStatus.USED else f"trust {proxy['trust']:.3f}"
    return f"- {record['key']['seed']}: held-out NLL of the proxy {value}, {outcome}"


def write_table(folder: Path) -> Path | None:
    """Sum up all results of a folder in `ablation.md`; its path, or None without any result."""
    return write_study_page(folder / "ablation.md", CHECK, _parts)


def _parts(records: list[dict[str, Any]]) -> list[str]:
    table = tabulate(records)
    notes = {key: [_note(record) for record in records if _row(record) == key] for key in table}
    return [
        "# Ablation of the symmetric stage",
        "Mean ± standard error over seeds; differences are paired by seed, with 95 % t-intervals; "
        "less is better in each. Frozen weights run at trust and temperature 1 and keep, like all "
        "variants, the library's choice of weights by held-out value. The best frozen weighting is "
        "chosen per metric after the fact.",
        "## Promises: adaptive is not worse than the best frozen weighting / than plain NPE\n\n"
        + _summary(table)
        + "\n\nholds: not worse in the mean; within noise: by at most twice the standard error; "
        "BROKEN: by more; worse, one seed: worse, without a standard error to compare with; –: not "
        "measured, or the proxy was refused, so that both are plain NPE.",
        *(_row_text(key, row, notes[key]) for key, row in sorted(table.items())),
    ]


# ------------------------------------------------------------------ the command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ablation`."""
    text = f"comma-separated tasks, or single rows as task:proxy {_arguments.DEFAULT}"
    parser.add_argument("--tasks", type=row_list, default=_DEFAULT_TASKS, help=text)
    parser.add_argument(
        "--simulations", type=_arguments.positive_int(20), default=1000, help=_arguments.DEFAULT
    )
    text = "also C2ST at 3 observations, 4 s per variant and each"
    parser.add_argument("--c2st", action="store_true", help=text)
    _arguments.add_run_arguments(parser, "ablation", seeds=3)


def run(args: argparse.Namespace) -> int:
    """Run the ablation and write `ablation.md`; the exit code, 1 if rows failed."""
    settings = replace(_SETTINGS.smoke(), observations=1) if args.fast else _SETTINGS
    budget, measurements = args.simulations, []
    for seed, row in [(seed, row) for seed in _arguments.seed_range(args) for row in args.tasks]:
        name = f"{row.task}:{row.condition}"
        key = {"row": name, "simulations": f"n{budget}", "seed": f"s{seed}"}
        arguments = {"task": get_task(row.task), "row": row, "simulations": budget, "seed": seed}
        measurements.append((key, {**arguments, "settings": settings, "with_c2st": args.c2st}))
    shared = {**asdict(settings), "c2st": args.c2st}
    return run_study(_STUDY, measurements, measure_row, shared, CHECK, write_table, args)

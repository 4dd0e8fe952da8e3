"""The table of leakage over rounds, in Markdown, with a verdict on its goal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sbi_jeffreys.benchmark.cells import Number
from sbi_jeffreys.benchmark.statistics import Methods, Seeds, nest, paired_difference, summarise
from sbi_jeffreys.benchmark.tables import (
    markdown,
    origin_text,
    read_valid,
    shown,
    study_check,
    write_page,
)

__all__ = ["CHECK", "STUDY", "goal", "tabulate", "write_table"]

STUDY = "rounds"
_GOAL = 0.95  # acceptance rate that no round should fall below
_BASELINE = "npe_nsf"
_SECONDS = Number(0.0)
CHECK = study_check(
    STUDY,
    {"task": str, "seed": re.compile(r"s\d+"), "method": str},
    {
        "rounds": [
            {
                "acceptance": Number(0.0, 1.0, nullable=False),
                "sampling_seconds": _SECONDS,
                "cpu_seconds": Number(0.0, nullable=False),
            }
        ],
        "c2st": Number(0.0, 1.0),
    },
)


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


def _task_text(task: str, methods: Methods, labels: Mapping[str, str]) -> str:
    """The table of one task."""
    names = [name for name in labels if name in methods]
    every = {m for name in names for values in methods[name].values() for m in values}
    last = max((int(m.rpartition("_")[2]) for m in every if m.startswith("acceptance")), default=0)
    numbers = range(1, last + 1)
    heads = [f"round {k}" for k in numbers]
    rows = [["method", "seeds", *heads, "goal", "slowest 1,000 (s)", "C2ST", "minus NPE", "cpu s"]]
    for name in names:
        seeds = methods[name]
        slowest = max((v["slowest"] for v in seeds.values() if "slowest" in v), default=None)
        baseline = {} if name == _BASELINE else methods.get(_BASELINE, {})
        rows.append(
            [
                labels[name],
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


def write_table(folder: Path, labels: Mapping[str, str]) -> Path | None:
    """Sum up all results of a folder in `rounds.md`; its path, or None without any result."""
    records = read_valid(folder, CHECK)
    if not records:
        return None
    parts = [
        "# Leakage over rounds",
        "Share of the density estimator's raw draws that lie inside the prior, at the observation, "
        "after each round; mean ± standard error over seeds, each with an observation of its own. "
        f"The goal: at least {_GOAL} in every round of every seed, and sampling that never stalls. "
        "C2ST to the reference after the last round, 0.5 is perfect.",
        *(_task_text(*entry, labels) for entry in sorted(tabulate(records).items())),
        origin_text(records),
    ]
    return write_page(folder / "rounds.md", parts)

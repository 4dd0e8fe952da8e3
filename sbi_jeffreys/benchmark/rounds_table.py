"""The table of leakage over rounds, in Markdown, with a verdict on its goal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sbi_jeffreys.benchmark.provenance import summary_lines
from sbi_jeffreys.benchmark.report import interval_text, markdown_table, summary_text
from sbi_jeffreys.benchmark.statistics import paired_difference, summarise
from sbi_jeffreys.benchmark.studies import read_study

__all__ = ["STUDY", "goal", "tabulate", "write_table"]

STUDY = "rounds"
_GOAL = 0.95  # acceptance rate that no round should fall below
_BASELINE = "npe_nsf"

#: method → seed → metric → value
TaskTable = dict[str, dict[int, dict[str, float]]]


def tabulate(records: Iterable[Mapping[str, Any]]) -> dict[str, TaskTable]:
    """Values by task, method and seed: `acceptance_1` …, `worst`, `slowest`, `stalled`, `c2st`."""
    table: dict[str, TaskTable] = {}
    for record in records:
        key, results = record["key"], record["results"]
        rounds, seconds = results["rounds"], [r["sampling_seconds"] for r in results["rounds"]]
        values = {f"acceptance_{k}": r["acceptance"] for k, r in enumerate(rounds, start=1)}
        values["worst"] = min(values.values())
        values["slowest"] = max((s for s in seconds if s is not None), default=None)
        values["stalled"] = float(None in seconds)
        values["cpu_seconds"] = sum(r["cpu_seconds"] for r in rounds)
        values["c2st"] = results["c2st"]
        known = {name: value for name, value in values.items() if value is not None}
        seeds = table.setdefault(key["task"], {}).setdefault(key["method"], {})
        seeds[int(key["seed"].removeprefix("s"))] = known
    return table


def goal(seeds: Mapping[int, Mapping[str, float]]) -> str:
    """Whether every round of every seed accepted enough and none stalled."""
    stalled = sum(values["stalled"] > 0 for values in seeds.values())
    if stalled:
        return f"MISSED: {stalled} of {len(seeds)} stalled"
    worst = min(values["worst"] for values in seeds.values())
    return f"met, worst {worst:.3f}" if worst >= _GOAL else f"MISSED, worst {worst:.3f}"


def _task_text(task: str, methods: TaskTable, labels: Mapping[str, str]) -> str:
    """The table of one task."""
    names = [name for name in labels if name in methods]
    every = {m for name in names for values in methods[name].values() for m in values}
    columns = sorted(
        (m for m in every if m.startswith("acceptance")), key=lambda m: int(m.rpartition("_")[2])
    )
    heads = [f"round {m.rpartition('_')[2]}" for m in columns]
    heads += ["goal", "slowest 1,000 (s)", "C2ST", "minus NPE", "cpu s"]
    rows = [["method", "seeds", *heads]]
    for name in names:
        seeds = methods[name]
        difference = paired_difference(seeds, methods.get(_BASELINE, {}), "c2st")
        slowest = max((v["slowest"] for v in seeds.values() if "slowest" in v), default=None)
        rows.append(
            [
                labels[name],
                str(len(seeds)),
                *(summary_text(summarise(seeds, m), 3) for m in columns),
                goal(seeds),
                "–" if slowest is None else f"{slowest:.2f}",
                summary_text(summarise(seeds, "c2st"), 3),
                "–" if name == _BASELINE else interval_text(difference),
                summary_text(summarise(seeds, "cpu_seconds"), 0),
            ]
        )
    return f"## {task}\n\n{markdown_table(rows)}"


def write_table(folder: Path, labels: Mapping[str, str]) -> Path | None:
    """Sum up all results of a folder in `rounds.md`; its path, or None without any result."""
    records = read_study(STUDY, folder)
    if not records:
        return None
    parts = [
        "# Leakage over rounds",
        "Share of the density estimator's raw draws that lie inside the prior, at the observation, "
        "after each round; mean ± standard error over seeds, each with an observation of its own. "
        f"The goal: at least {_GOAL} in every round of every seed, and sampling that never stalls. "
        "C2ST to the reference after the last round, 0.5 is perfect.",
        *(_task_text(*entry, labels) for entry in sorted(tabulate(records).items())),
        "## Where this comes from\n\n" + summary_lines(records),
    ]
    path = folder / "rounds.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path

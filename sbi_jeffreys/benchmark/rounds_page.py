"""The page on several rounds: a table per task, from the records of `benchmark.rounds`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sbi_jeffreys.benchmark.cells import Number, study_check
from sbi_jeffreys.benchmark.statistics import Methods, Seeds, nest, paired_difference, summarise
from sbi_jeffreys.benchmark.tables import markdown, shown, write_study_page

__all__ = ["CHECK", "LABELS", "STUDY", "write_page"]

STUDY = "rounds"
#: What tables call the methods, in their order.
LABELS = {
    "npe_nsf": "NPE, atomic",
    "npe_truncated": "NPE, truncated",
    "nle_mcmc": "NLE + MCMC",
    "npe_jeffreys": "NPE_Jeffreys, atomic",
    "npe_jeffreys_corrected": "NPE_Jeffreys, corrected proposals",
    "npe_jeffreys_truncated": "NPE_Jeffreys, truncated",
}
_BASELINE = "npe_nsf"
_GOAL = 0.95  # the acceptance rate that every round should reach
_SCORE = Number(0.0, 1.0)
_ROUND = {
    "acceptance": _SCORE,
    "sampling_seconds": Number(0.0),
    "cpu_seconds": Number(0.0, nullable=False),
    "c2st": _SCORE,
}
CHECK = study_check(
    STUDY,
    {"task": str, "seed": re.compile(r"s\d+"), "method": str},
    {"rounds": [_ROUND], "corrected": _SCORE, "focused": _SCORE},
)


def tabulate(records: Iterable[Mapping[str, Any]]) -> dict[str, Methods]:
    """Values by task, method and seed; `c2st` is that of the last round."""
    return nest(_values(record) for record in records)


def _values(record: Mapping[str, Any]) -> tuple[str, str, int, dict[str, Any]]:
    key, results = record["key"], record["results"]
    rounds = results["rounds"]
    accepted = [entry["acceptance"] for entry in rounds if entry["acceptance"] is not None]
    seconds = [entry["sampling_seconds"] for entry in rounds]
    values: dict[str, Any] = {f"c2st_{k}": entry["c2st"] for k, entry in enumerate(rounds, 1)}
    values["c2st"] = rounds[-1]["c2st"] if rounds else None
    values |= {name: results[name] for name in ("corrected", "focused")}
    values["worst"] = min(accepted, default=None)
    values["slowest"] = max((s for s in seconds if s is not None), default=None)
    values["stalled"] = None in seconds
    values["cpu_seconds"] = sum(entry["cpu_seconds"] for entry in rounds)
    return key["task"], key["method"], int(key["seed"].removeprefix("s")), values


def goal(seeds: Seeds) -> str:
    """Whether every round of every seed accepted enough and none stalled."""
    stalled = sum(values["stalled"] > 0 for values in seeds.values())
    if stalled:
        return f"MISSED: {stalled} of {len(seeds)} stalled"
    accepted = [values["worst"] for values in seeds.values() if "worst" in values]
    if not accepted:
        return "–"
    return f"{'met' if min(accepted) >= _GOAL else 'MISSED'}, worst {min(accepted):.3f}"


def _task_text(task: str, methods: Methods) -> str:
    """The table of one task."""
    every = {m for seeds in methods.values() for values in seeds.values() for m in values}
    last = max((int(m.removeprefix("c2st_")) for m in every if m.startswith("c2st_")), default=0)
    columns = {f"c2st_{k}": f"C2ST, round {k}" for k in range(1, last + 1)}
    columns |= {"corrected": "corrected", "focused": "focused"}
    rows = [["method", "seeds", *columns.values(), "minus NPE", "inside", "sampling (s)", "cpu s"]]
    for name in (name for name in LABELS if name in methods):
        seeds = methods[name]
        slowest = max((v["slowest"] for v in seeds.values() if "slowest" in v), default=None)
        baseline = {} if name == _BASELINE else methods.get(_BASELINE, {})
        rows.append(
            [
                LABELS[name],
                str(len(seeds)),
                *(shown(summarise(seeds, column), ".3f") for column in columns),
                shown(paired_difference(seeds, baseline, "c2st")),
                goal(seeds),
                shown(slowest, ".1f"),
                shown(summarise(seeds, "cpu_seconds"), ".0f"),
            ]
        )
    return f"## {task}\n\n{markdown(rows)}"


def write_page(folder: Path) -> Path | None:
    """Sum up all results of a folder in `rounds.md`; its path, or None without any result."""
    return write_study_page(folder / "rounds.md", CHECK, _parts)


def _parts(records: list[dict[str, Any]]) -> list[str]:
    return [
        "# Several rounds at one observation",
        "C2ST to the reference after each round (0.5 is perfect), and after the last one of the "
        "corrected and the focused posterior; mean ± standard error over seeds, each with an "
        "observation of its own. *Minus NPE* compares the last round's posteriors, paired by seed. "
        "*Inside* is the share of the density estimator's raw draws that lie inside the prior; the "
        f"goal is at least {_GOAL} in every round of every seed, and sampling that never stalls. "
        "*Sampling* is the slowest drawing of the samples, *cpu s* the training of all rounds.",
        *(_task_text(*entry) for entry in sorted(tabulate(records).items())),
    ]

"""From result files to numbers: means over seeds, differences paired by seed, wins and losses."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

__all__ = [
    "Difference",
    "Group",
    "Summary",
    "collect",
    "paired_difference",
    "paired_values",
    "ratio",
    "summarise",
]

#: (task, simulations) → method → seed → metric → value
Group = tuple[str, int]
Table = dict[Group, dict[str, dict[int, dict[str, float]]]]

#: Metrics of which less is better, in the order of the report, with their titles.
SCORES = {
    "c2st": "C2ST",
    "nll": "NLL (nats)",
    "coverage_error_90": "abs. coverage error at 90 %",
    "leakage": "leakage",
    "mode_l1": "mode mass L1",
    "jeffreys": "Jeffreys divergence (nats)",
}
_NOMINAL = (50, 90, 95)


@dataclass(frozen=True)
class Summary:
    """Mean over seeds with its standard error (NaN for one seed)."""

    mean: float
    standard_error: float
    count: int


@dataclass(frozen=True)
class Difference:
    """Mean difference to the baseline by seed, with its 95 % t-interval (NaN for one seed)."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def verdict(self) -> str:
        """win, loss or tie of a metric of which less is better; tie where zero is inside."""
        if self.high < 0:
            return "win"
        return "loss" if self.low > 0 else "tie"


def collect(records: Iterable[Mapping[str, Any]]) -> Table:
    """Values of finished cells by task and budget, method, and seed."""
    table: Table = defaultdict(lambda: defaultdict(dict))
    for record in records:
        cell = record["cell"]
        group = (cell["task"], cell["simulations"])
        table[group][cell["method"]][cell["seed"]] = _values(record)
    return {group: dict(methods) for group, methods in table.items()}


def _values(record: Mapping[str, Any]) -> dict[str, float]:
    """Finite metrics of one cell, with coverage errors, time and memory."""
    named = dict(record["metrics"])
    for level in _NOMINAL:
        coverage = named.get(f"coverage_{level}")
        if coverage is not None:
            named[f"coverage_error_{level}"] = abs(coverage - level / 100)
    training = record["training"]
    named["train_seconds"] = training.get("seconds")
    named["train_cpu_seconds"] = training.get("cpu_seconds")
    named["peak_mib"] = training.get("peak_mib")
    named["resident_mib"] = training.get("resident_mib")
    named["sampling_seconds"] = record.get("evaluation_seconds", {}).get("sampling")
    return {name: float(value) for name, value in named.items() if value is not None}


def summarise(seeds: Mapping[int, Mapping[str, float]], metric: str) -> Summary | None:
    """Mean over the seeds that have the metric, or None."""
    values = [entry[metric] for entry in seeds.values() if metric in entry]
    if not values:
        return None
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Summary(fmean(values), error, len(values))


def paired_difference(
    seeds: Mapping[int, Mapping[str, float]],
    baseline: Mapping[int, Mapping[str, float]],
    metric: str,
) -> Difference | None:
    """Difference to the baseline over the seeds that both have, or None without any."""
    from scipy.stats import t

    differences = [a - b for a, b in paired_values(seeds, baseline, metric)]
    if not differences:
        return None
    count, mean = len(differences), fmean(differences)
    if count == 1:
        return Difference(mean, math.nan, math.nan, count)
    half = float(t.ppf(0.975, count - 1)) * stdev(differences) / math.sqrt(count)
    return Difference(mean, mean - half, mean + half, count)


def ratio(
    seeds: Mapping[int, Mapping[str, float]],
    baseline: Mapping[int, Mapping[str, float]],
    metric: str,
) -> float | None:
    """Geometric mean over common seeds of the ratio to the baseline, or None."""
    pairs = [(a, b) for a, b in paired_values(seeds, baseline, metric) if a > 0 and b > 0]
    return math.exp(fmean([math.log(a / b) for a, b in pairs])) if pairs else None


def paired_values(
    seeds: Mapping[int, Mapping[str, float]],
    baseline: Mapping[int, Mapping[str, float]],
    metric: str,
) -> list[tuple[float, float]]:
    """Values of method and baseline at the seeds where both are known."""
    return [
        (seeds[seed][metric], baseline[seed][metric])
        for seed in sorted(seeds.keys() & baseline.keys())
        if metric in seeds[seed] and metric in baseline[seed]
    ]


def differences(
    table: Table, method: str, baseline: str, metrics: Sequence[str] = tuple(SCORES)
) -> dict[tuple[Group, str], Difference]:
    """All paired differences of a method to a baseline, by group and metric."""
    found = {}
    for group, methods in table.items():
        if method not in methods or baseline not in methods:
            continue
        for metric in metrics:
            difference = paired_difference(methods[method], methods[baseline], metric)
            if difference is not None:
                found[group, metric] = difference
    return found

"""From result files to numbers: means over seeds, differences paired by seed, wins and losses."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

__all__ = ["Difference", "Summary", "collect", "paired_difference", "ratio", "summarise"]

Seeds = Mapping[int, Mapping[str, float]]  # seed → metric → value
Methods = dict[str, dict[int, dict[str, float]]]  # method → seed → metric → value
Group = tuple[str, int]  # task, simulations

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
    """Mean over seeds with its standard error (NaN for one seed); `f"{summary:.3f}"` shows both."""

    mean: float
    standard_error: float
    count: int

    def __format__(self, spec: str) -> str:
        mean = format(self.mean, spec)
        known = not math.isnan(self.standard_error)
        return f"{mean} ± {format(self.standard_error, spec)}" if known else mean


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
        return "win" if self.high < 0 else "loss" if self.low > 0 else "tie"

    def __str__(self) -> str:
        if self.count == 1:
            return f"{self.mean:+.3f} (one seed)"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def nest(values: Iterable[tuple[Hashable, str, int, Mapping[str, Any]]]) -> dict[Any, Methods]:
    """(group, method, seed, metrics) → group → method → seed → the metrics that are known.

    Every level has the absolute errors of the coverages at 50, 90 and 95 % added.
    """
    table: dict[Any, Methods] = {}
    for group, method, seed, metrics in values:
        known = {name: float(value) for name, value in metrics.items() if value is not None}
        for level in _NOMINAL:
            if (coverage := known.get(f"coverage_{level}")) is not None:
                known[f"coverage_error_{level}"] = abs(coverage - level / 100)
        table.setdefault(group, {}).setdefault(method, {})[seed] = known
    return table


def collect(records: Iterable[Mapping[str, Any]]) -> dict[Group, Methods]:
    """Metrics, time and memory of finished cells by task and budget, method, and seed."""
    return nest(_values(record) for record in records)


def _values(record: Mapping[str, Any]) -> tuple[Group, str, int, dict[str, Any]]:
    cell, training = record["cell"], record["training"]
    costs = {
        "train_seconds": training.get("seconds"),
        "train_cpu_seconds": training.get("cpu_seconds"),
        "peak_mib": training.get("peak_mib"),
        "resident_mib": training.get("resident_mib"),
        "sampling_seconds": record.get("evaluation_seconds", {}).get("sampling"),
    }
    group = (cell["task"], cell["simulations"])
    return group, cell["method"], cell["seed"], {**record["metrics"], **costs}


def summarise(seeds: Seeds, metric: str) -> Summary | None:
    """Mean over the seeds that have the metric, or None."""
    values = [entry[metric] for entry in seeds.values() if metric in entry]
    if not values:
        return None
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Summary(fmean(values), error, len(values))


def paired_difference(seeds: Seeds, baseline: Seeds, metric: str) -> Difference | None:
    """Difference to the baseline over the seeds that both have, or None without any."""
    from scipy.stats import t

    gap = paired_summary(seeds, baseline, metric)
    if gap is None:
        return None
    half = float(t.ppf(0.975, gap.count - 1)) * gap.standard_error
    return Difference(gap.mean, gap.mean - half, gap.mean + half, gap.count)


def paired_summary(seeds: Seeds, baseline: Seeds, metric: str) -> Summary | None:
    """Mean and standard error of the difference over the seeds that both have."""
    pairs = enumerate(paired_values(seeds, baseline, metric))
    return summarise({k: {metric: a - b} for k, (a, b) in pairs}, metric)


def ratio(seeds: Seeds, baseline: Seeds, metric: str) -> float | None:
    """Geometric mean over common seeds of the ratio to the baseline, or None."""
    pairs = [(a, b) for a, b in paired_values(seeds, baseline, metric) if a > 0 and b > 0]
    return math.exp(fmean([math.log(a / b) for a, b in pairs])) if pairs else None


def paired_values(seeds: Seeds, baseline: Seeds, metric: str) -> list[tuple[float, float]]:
    """Values of method and baseline at the seeds where both are known."""
    return [
        (seeds[seed][metric], baseline[seed][metric])
        for seed in sorted(seeds.keys() & baseline.keys())
        if metric in seeds[seed] and metric in baseline[seed]
    ]


def differences(
    table: Mapping[Group, Methods], method: str, baseline: str
) -> dict[tuple[Group, str], Difference]:
    """Paired differences of a method to a baseline, by group and score."""
    return {
        (group, metric): found
        for group, methods in table.items()
        for metric in SCORES
        if (found := paired_difference(methods.get(method, {}), methods.get(baseline, {}), metric))
    }

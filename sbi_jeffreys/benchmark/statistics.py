"""From result files to numbers: means over seeds, differences paired by seed, wins and losses."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, geometric_mean, stdev
from typing import Any

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
class Difference(Summary):
    """Mean difference to a baseline over common seeds; as text, with its 95 % t-interval."""

    @property
    def half_width(self) -> float:
        """Half the width of the 95 % t-interval; NaN for one seed."""
        from scipy.stats import t

        return float(t.ppf(0.975, self.count - 1)) * self.standard_error

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half_width

    @property
    def verdict(self) -> str:
        """win, loss or tie (0 in the interval) where less is better; unknown with one seed."""
        if self.count == 1:
            return "unknown"
        return "win" if self.high < 0 else "loss" if self.low > 0 else "tie"

    def __format__(self, spec: str) -> str:
        mean, low, high = (format(v, spec or "+.3f") for v in (self.mean, self.low, self.high))
        return f"{mean} (one seed)" if self.count == 1 else f"{mean} [{low}, {high}]"


def nest(values: Iterable[tuple[Hashable, str, int, Mapping[str, Any]]]) -> dict[Any, Methods]:
    """(group, method, seed, metrics) → group → method → seed → the metrics that are known.

    The absolute errors of the coverages at 50, 90 and 95 % are added to the metrics.
    """
    table: dict[Any, Methods] = {}
    for group, method, seed, metrics in values:
        known = {name: float(value) for name, value in metrics.items() if value is not None}
        for level in (50, 90, 95):
            if (coverage := known.get(f"coverage_{level}")) is not None:
                known[f"coverage_error_{level}"] = abs(coverage - level / 100)
        table.setdefault(group, {}).setdefault(method, {})[seed] = known
    return table


def collect(records: Iterable[Mapping[str, Any]]) -> dict[Group, Methods]:
    """Metrics, time and memory of finished cells by task and budget, method, and seed."""
    return nest(_values(record) for record in records)


def _values(record: Mapping[str, Any]) -> tuple[Group, str, int, dict[str, Any]]:
    cell, training = record["cell"], record["training"]
    values = {
        **record["metrics"],
        "train_seconds": training.get("seconds"),
        "train_cpu_seconds": training.get("cpu_seconds"),
        "peak_mib": training.get("peak_mib"),
        "resident_mib": training.get("resident_mib"),
        "fell_back": training.get("fell_back"),
    }
    return (cell["task"], cell["simulations"]), cell["method"], cell["seed"], values


def summarise(seeds: Seeds, metric: str) -> Summary | None:
    """Mean over the seeds that have the metric, or None if no seed has it."""
    values = [entry[metric] for entry in seeds.values() if metric in entry]
    return Summary(*_moments(values)) if values else None


def paired_difference(seeds: Seeds, baseline: Seeds, metric: str) -> Difference | None:
    """Difference to the baseline over the seeds that both have, or None if they share no seed."""
    values = [a - b for a, b in _paired_values(seeds, baseline, metric)]
    return Difference(*_moments(values)) if values else None


def ratio(seeds: Seeds, baseline: Seeds, metric: str) -> float | None:
    """Geometric mean over common seeds of the ratio to the baseline, or None without any."""
    found = paired_ratios(seeds, baseline, metric)
    return geometric_mean(found) if found else None


def paired_ratios(seeds: Seeds, baseline: Seeds, metric: str) -> list[float]:
    """Ratios to the baseline at the common seeds where both values are positive."""
    pairs = _paired_values(seeds, baseline, metric)
    return [a / b for a, b in pairs if a > 0 and b > 0]


def average(tasks: Sequence[Seeds]) -> dict[int, dict[str, float]]:
    """Means over tasks, seed by seed, of the seeds and metrics that every task has."""
    common = set.intersection(*(set(seeds) for seeds in tasks)) if tasks else set()
    means = {}
    for seed in sorted(common):
        metrics = set.intersection(*(set(seeds[seed]) for seeds in tasks))
        means[seed] = {name: fmean(seeds[seed][name] for seeds in tasks) for name in metrics}
    return means


def _moments(values: list[float]) -> tuple[float, float, int]:
    """Mean, its standard error, and the number of values."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return fmean(values), error, len(values)


def _paired_values(seeds: Seeds, baseline: Seeds, metric: str) -> list[tuple[float, float]]:
    """Values of a method and of the baseline at the seeds where both are known."""
    return [
        (seeds[seed][metric], baseline[seed][metric])
        for seed in sorted(seeds.keys() & baseline.keys())
        if metric in seeds[seed] and metric in baseline[seed]
    ]

"""What a held-out report can find, as values; the sentences are made from them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["Finding", "FindingKind", "Measurement", "Statistic"]


class FindingKind(Enum):
    """What is wrong with a posterior."""

    OVERCONFIDENT = "overconfident"
    TOO_WIDE = "too wide"
    WRONG_SHAPE = "of the wrong shape"
    MISSES_MASS = "misses mass"
    BIASED = "biased"
    LEAKS = "leaks"
    DISAGREES_WITH_PROXY = "disagrees with its proxy"


class Statistic(Enum):
    """What was measured. Ranks are those of the true parameters among the posterior's draws."""

    COVERAGE = "share of the true parameters inside the HPD region of the expected level"
    MEAN_DENSITY_RANK = "mean rank by density, 0 at the densest point"
    MEAN_RANK = "mean rank of one parameter"
    RANK_DISTANCE = "mean distance of one parameter's rank from 0.5"
    MISSED_PAIRS = "share of the pairs whose true parameter is less dense than every draw"
    LEAKAGE = "mass outside the prior"
    REVERSE_KL = "reverse KL to the proxy, in nats"
    EFFECTIVE_SAMPLE_SIZE = "effective sample size under the proxy, as a fraction of the draws"


@dataclass(frozen=True)
class Measurement:
    """One statistic, and what it should be.

    Attributes:
        statistic: What was measured.
        value: The value found.
        expected: The value of an exact posterior; for coverage, the nominal level.
        low: Lower end of the interval that is accepted, by chance or by tolerance.
        high: Upper end of that interval.
        parameter: Index of the parameter, from 0, where the statistic is of a single one.
    """

    statistic: Statistic
    value: float
    expected: float
    low: float
    high: float
    parameter: int | None = None

    def __str__(self) -> str:
        """A clause with the value, what was expected, and the accepted interval."""
        value, expected, low, high = self.value, self.expected, self.low, self.high
        half = (high - low) / 2
        clauses = {
            Statistic.COVERAGE: f"the {100 * expected:.0f} % region holds {100 * value:.0f} % of "
            f"the true parameters ({100 * low:.0f}–{100 * high:.0f} % by chance)",
            Statistic.MEAN_DENSITY_RANK: "the mean rank of the true parameters by density is "
            f"{value:.2f} ({expected:.2f} ± {half:.2f} by chance)",
            Statistic.MEAN_RANK: f"mean rank of the true parameter {value:.2f}, "
            f"{expected:.2f} ± {half:.2f} by chance",
            Statistic.RANK_DISTANCE: f"its ranks are {value:.3f} away from 0.5 on average "
            f"({expected:.3f} ± {half:.3f} by chance)",
            Statistic.MISSED_PAIRS: f"at {100 * value:.0f} % of the pairs the true parameter is "
            f"less likely than all draws ({100 * expected:.1f} % expected)",
            Statistic.LEAKAGE: f"{100 * value:.0f} % of the mass is outside the prior",
            Statistic.REVERSE_KL: f"the reverse KL is {value:.1f} nats",
            Statistic.EFFECTIVE_SAMPLE_SIZE: "importance weights keep "
            f"{100 * value:.0f} % of the draws",
        }
        return clauses[self.statistic]


#: What follows from a finding, where the numbers alone do not say it.
_CONSEQUENCES = {
    FindingKind.MISSES_MASS: ": a mode may be missing, or the posterior is much too narrow",
    FindingKind.LEAKS: "; samples there are rejected, and the density inside is too low by as much",
    FindingKind.DISAGREES_WITH_PROXY: "; compare the coverage and the held-out NLL of both to see "
    "which of the two is wrong",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a posterior; `str(finding)` is a sentence about it.

    Attributes:
        kind: What is wrong.
        measurements: The statistics that show it.
    """

    kind: FindingKind
    measurements: tuple[Measurement, ...]

    @property
    def parameters(self) -> tuple[int, ...]:
        """Indices of the single parameters that it is about; empty if it is about all of θ."""
        return tuple(m.parameter for m in self.measurements if m.parameter is not None)

    def __str__(self) -> str:
        """The kind, the measurements, and what follows."""
        if self.kind is FindingKind.BIASED:
            clauses = [f"{_name(m)} {_direction(m)} ({m})" for m in self.measurements]
        elif self.parameters:
            clauses = [f"in {_name(m)}, {m}" for m in self.measurements]
        else:
            clauses = [str(m) for m in self.measurements]
        return f"{self.kind.value}: {'; '.join(clauses)}{_CONSEQUENCES.get(self.kind, '')}"


def _name(measurement: Measurement) -> str:
    return f"θ{(measurement.parameter or 0) + 1}"


def _direction(measurement: Measurement) -> str:
    """Where the posterior lies: a true parameter of high rank lies above most draws."""
    return "too low" if measurement.value > measurement.expected else "too high"

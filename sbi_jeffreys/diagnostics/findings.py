"""What a held-out report can find, as values from which the sentences are made."""

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
        value, half = self.value, (self.high - self.low) / 2
        chance = f"{self.expected:.2f} ± {half:.2f} by chance"
        percent, expected, low, high = (
            f"{100 * x:.0f}" for x in (value, self.expected, self.low, self.high)
        )
        return {
            Statistic.COVERAGE: f"the {expected} % region holds {percent} % of the true parameters "
            f"({low}–{high} % by chance)",
            Statistic.MEAN_DENSITY_RANK: "the mean rank of the true parameters by density is "
            f"{value:.2f} ({chance})",
            Statistic.MEAN_RANK: f"mean rank of the true parameter {value:.2f}, {chance}",
            Statistic.RANK_DISTANCE: f"its ranks are {value:.3f} away from 0.5 on average "
            f"({self.expected:.3f} ± {half:.3f} by chance)",
            Statistic.MISSED_PAIRS: f"at {percent} % of the pairs the true parameter is less "
            f"likely than all draws ({100 * self.expected:.1f} % expected)",
            Statistic.LEAKAGE: f"{percent} % of the mass is outside the prior",
            Statistic.REVERSE_KL: f"the reverse KL is {value:.1f} nats",
            Statistic.EFFECTIVE_SAMPLE_SIZE: f"importance weights keep {percent} % of the draws",
        }[self.statistic]


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
        """Indices of the single parameters concerned; empty if the finding is about all of θ."""
        return tuple(m.parameter for m in self.measurements if m.parameter is not None)

    def __str__(self) -> str:
        """The kind, the measurements, and what follows."""
        clauses = []
        for found in self.measurements:
            name = f"θ{(found.parameter or 0) + 1}"
            if self.kind is FindingKind.BIASED:
                # A true parameter of high rank lies above most draws.
                way = "too low" if found.value > found.expected else "too high"
                clauses.append(f"{name} {way} ({found})")
            else:
                clauses.append(str(found) if found.parameter is None else f"in {name}, {found}")
        return f"{self.kind.value}: {'; '.join(clauses)}{_CONSEQUENCES.get(self.kind, '')}"

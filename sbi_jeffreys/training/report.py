"""What training decided, as values from which the words of the report are made.

`NPE_Jeffreys.training_report` is a `TrainingReport` after every training. Printed, the report says
in a few lines which proxy was used and how far it was trusted, the held-out losses of main and
proxy, which weights were kept, and what to do about anything that went wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from sbi_jeffreys.diagnostics.calibration import CoverageCurve, mean_and_error

__all__ = [
    "REFUSED",
    "Estimate",
    "Kept",
    "Problem",
    "ProxyStatus",
    "Space",
    "SpaceChoice",
    "StageStatus",
    "TrainingReport",
]


class ProxyStatus(Enum):
    """Whether the proxy was used, and if not, why."""

    NOT_FITTED = "not fitted, because the symmetric stage has no steps"
    ABSENT = "there is no proxy for these simulations"
    USED = "used"
    UNTRUSTED = "refused, because its held-out loss is much higher than plain NPE's"
    IMPLAUSIBLE = "refused, because its draws do not look like simulations"
    UNSAMPLED = "refused, because no draw of theta had mass under its posterior at any simulation"
    NO_KERNEL_WEIGHT = (
        "refused, because the calibration kernel is zero at every draw or held-out simulation"
    )


class StageStatus(Enum):
    """How far the symmetric stage got."""

    NOT_RUN = "not run"
    PAUSED = "paused before its last step"
    FINISHED = "finished"
    STOPPED = "stopped because the held-out loss stayed far above plain NPE's"


class Kept(Enum):
    """Which weights the main has."""

    PLAIN_NPE = "those of plain NPE"
    BEST = "the best on held-out simulations"
    LAST = "the last, annealed ones"


class Space(Enum):
    """Where the main models θ."""

    PRIOR = "in the prior's unconstrained space"
    OWN = "in its own space, cut off at the prior's edge"


class Problem(Enum):
    """What keeps a result from being what the method promises; the value says what to do."""

    NO_PROXY = "plain NPE was kept; the brackets say what to change"
    PROXY_REFUSED = (
        "plain NPE was kept; run more simulations, or pass a proxy that suits x "
        "(JeffreysOptions(proxy='energy') or a GivenProxy)"
    )
    KERNEL = "plain NPE was kept; widen calibration_kernel"
    STAGE_PAUSED = "continue with train(resume_training=True)"
    STAGE_STOPPED = (
        "the best weights from before it were kept; lower JeffreysOptions.learning_rate_factor, or "
        "run more simulations"
    )
    MULTIPLIER_AT_BOUND = (
        "the main could not reach its proxy's held-out loss; pass options='thorough' or a larger "
        "density_estimator, or correct the draws with build_corrected_posterior()"
    )
    MAIN_BEHIND_PROXY = (
        "pass options='thorough' or a larger density_estimator, or correct the draws with "
        "build_corrected_posterior()"
    )
    MAIN_APART = (
        "the main was trained for too few steps or is too small; pass options='thorough' or a "
        "larger density_estimator, such as MainBuilder('nsf', hidden_features=100), or correct the "
        "draws with build_corrected_posterior()"
    )
    COVERS_LESS = (
        "its credible regions are too small; correct the draws with build_corrected_posterior(), "
        "check held_out_report() on new simulations, or use plain NPE, "
        "JeffreysOptions(num_steps=0)"
    )
    STEPS_SKIPPED = (
        "look for outliers in x and for a prior or likelihood that is not finite; lower the "
        "learning_rate"
    )


#: Statuses of a proxy that was fitted but not used, so that plain NPE was kept.
REFUSED = (
    ProxyStatus.UNTRUSTED,
    ProxyStatus.IMPLAUSIBLE,
    ProxyStatus.UNSAMPLED,
    ProxyStatus.NO_KERNEL_WEIGHT,
)


@dataclass(frozen=True)
class Estimate:
    """A mean over held-out pairs, in nats, with its standard error (NaN for a single pair).

    Both are weighted by the calibration kernel, if there is one.
    """

    value: float
    error: float

    @classmethod
    def of(cls, losses: Tensor, weights: Tensor | None = None) -> Estimate:
        """The estimate from one loss per pair, `(M,)`, and the calibration kernel's weights."""
        return cls(*mean_and_error(losses, weights))

    def __str__(self) -> str:
        one = math.isnan(self.error) and math.isfinite(self.value)
        return f"{self.value:.2f}{' (a single pair)' if one else f' ± {self.error:.2f}'}"


@dataclass(frozen=True)
class SpaceChoice:
    """The space in which plain NPE models θ, where it was kept and trained in both spaces.

    Attributes:
        kept: The space of the network that was kept.
        prior: Held-out loss of plain NPE in the prior's unconstrained space.
        own: Held-out loss of plain NPE in θ's own space, corrected for the mass outside the prior.
        gain: `prior` minus `own`, pair by pair.
    """

    kept: Space
    prior: Estimate
    own: Estimate
    gain: Estimate

    def __str__(self) -> str:
        words = f"Plain NPE models theta {self.kept.value}"
        if self.kept is Space.OWN:
            return (
                f"{words}: on held-out simulations it is better there by {self.gain} nats than "
                f"{Space.PRIOR.value}."
            )
        return (
            f"{words}: {Space.OWN.value}, it is not clearly better on held-out simulations "
            f"(gain {self.gain} nats)."
        )


@dataclass(frozen=True)
class TrainingReport:
    """The outcome of one call of `train`; `str(report)` has it in words.

    Attributes:
        proxy_status: Whether the proxy was used, and if not, why.
        proxy: Which proxy was chosen, and why, in words.
        experts: Names and mixture weights of a likelihood proxy's experts; for the product of an
            energy and a likelihood, the powers of the two.
        trust: t in [0, 1], how far the proxy was followed.
        inverse_temperature: γ of the proxy.
        stage_status: How far the symmetric stage got.
        kept: Which weights the main has.
        npe: Held-out loss of plain NPE.
        proxy_held_out: Held-out loss of the proxy, None without one.
        main: Held-out loss of the main that was kept.
        gap: Held-out loss of the kept main minus the proxy's, pair by pair; None without a proxy.
        multiplier: λ at the end, None without a symmetric stage.
        skipped_steps: Steps that were skipped because their gradient was not finite.
        restarts: How often the stage began again, at a third of the step size.
        seconds: Wall time of plain NPE, of the proxy, and of the symmetric stage.
        problems: What keeps the result from being what the method promises.
        atomic: Whether held-out losses are those of a classifier of θ among other pairs' θ (later
            rounds), not negative log densities.
        apart: How far main and proxy are apart at observations that the proxy draws, at the end of
            the stage: half the variance of log p − log q̃ over the main's samples, in nats.
        uncertain: Share of the held-out pairs at which the proxy's loss could not be bounded well.
        coverage_before: Coverage of plain NPE's 50 and 90 % regions on held-out pairs; None in
            later rounds.
        coverage: The same of the main that was kept.
        space: Where plain NPE models θ. None where there was no choice: where the symmetric stage's
            weights were kept, in later rounds, and where the main does not model θ in the
            unconstrained space of a bounded prior.
    """

    proxy_status: ProxyStatus
    proxy: str
    experts: tuple[tuple[str, float], ...]
    trust: float
    inverse_temperature: float
    stage_status: StageStatus
    kept: Kept
    npe: Estimate | None
    proxy_held_out: Estimate | None
    main: Estimate | None
    gap: Estimate | None
    multiplier: float | None
    skipped_steps: int
    restarts: int
    seconds: tuple[float, float, float]
    problems: tuple[Problem, ...]
    atomic: bool = False
    apart: float | None = None
    uncertain: float = 0.0
    coverage_before: CoverageCurve | None = None
    coverage: CoverageCurve | None = None
    space: SpaceChoice | None = None

    @property
    def refused(self) -> bool:
        """Whether there is a proxy that was not used."""
        return self.proxy_status in REFUSED

    def describe(self, problem: Problem) -> str:
        """One of the problems in words: what it is, the figures, and what to do."""
        words = _NAMES[problem]
        if problem in (Problem.NO_PROXY, Problem.PROXY_REFUSED, Problem.KERNEL):
            words = f"NPE_Jeffreys falls back to plain NPE. {words} ({self.proxy})"
        elif problem is Problem.MAIN_BEHIND_PROXY and self.gap is not None:
            words += f" by {self.gap} nats"
        elif problem is Problem.MAIN_APART:
            words += f" ({self.apart:.1f} nats)"
        elif problem is Problem.STEPS_SKIPPED:
            words += f" ({self.skipped_steps} steps)"
        return f"{words}: {problem.value}."

    def __str__(self) -> str:
        """Two to five lines, and one for each problem."""
        plain, proxy, stage = self.seconds
        lines = [
            self._proxy_words(),
            self._held_out_words(),
            f"Symmetric stage {self.stage_status.value}; weights kept: {self.kept.value}; plain "
            f"NPE took {plain:.1f} s, the proxy {proxy:.1f} s, the stage {stage:.1f} s.",
        ]
        if self.space is not None:
            lines.append(str(self.space))
        lines += [self.describe(problem) for problem in self.problems]
        return "\n".join(line for line in lines if line)

    def _proxy_words(self) -> str:
        words = f"Proxy ({self.proxy}): {self.proxy_status.value}"
        if self.proxy_status is ProxyStatus.USED:
            words += f" with trust {self.trust:.2f}"
        if self.inverse_temperature != 1:
            words += f", tempered with γ = {self.inverse_temperature:.2f}"
        if self.experts:
            experts = [f"{name} {weight:.2f}" for name, weight in self.experts]
            words += f"; experts {', '.join(experts)}"
        return words + "."

    def _held_out_words(self) -> str:
        if self.npe is None:
            return ""
        unit = "classification loss" if self.atomic else "negative log density"
        parts = [f"plain NPE {self.npe}"]
        if self.proxy_held_out is not None:
            doubt = " or less (its normaliser is uncertain at {:.0f} % of the pairs)"
            doubt = doubt.format(100 * self.uncertain) if self.uncertain > 0.1 else ""
            parts.append(f"proxy {self.proxy_held_out}{doubt}")
        if self.main is not None:
            parts.append(f"main {self.main}")
        return f"Held-out {unit} in nats: {', '.join(parts)}.{self._coverage_words()}"

    def _coverage_words(self) -> str:
        if self.coverage is None:
            return ""
        half, most = (100 * float(value) for value in self.coverage.values)
        low, high = 100 * self.coverage.lower, 100 * self.coverage.upper
        num, chance = self.coverage.num_pairs, [f"{a:.0f}–{b:.0f}" for a, b in zip(low, high)]
        return (
            f" The main's 50 and 90 % regions hold {half:.0f} and {most:.0f} % of the true "
            f"parameters of {num} pairs (by chance {chance[0]} and {chance[1]})."
        )


_NAMES = {
    Problem.NO_PROXY: "There is no proxy",
    Problem.PROXY_REFUSED: "The proxy is worse than plain NPE, or of no use for draws",
    Problem.KERNEL: "The calibration kernel excludes every draw of the proxy, or every held-out "
    "simulation",
    Problem.STAGE_PAUSED: "The epoch budget max_num_epochs ended the symmetric stage",
    Problem.STAGE_STOPPED: "The symmetric stage diverged and was stopped",
    Problem.MULTIPLIER_AT_BOUND: "The multiplier was at its bound at the end",
    Problem.MAIN_BEHIND_PROXY: "The main is behind its proxy on held-out simulations",
    Problem.MAIN_APART: "Main and proxy are far apart on the proxy's own draws",
    Problem.COVERS_LESS: "The main covers less of the held-out parameters than plain NPE did",
    Problem.STEPS_SKIPPED: "Steps were skipped because their gradient was not finite",
}

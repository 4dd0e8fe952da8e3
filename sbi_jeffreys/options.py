"""Everything that can be set about the symmetric objective, typed and validated in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sbi_jeffreys._checks import (
    check_bool,
    check_choice,
    check_float,
    check_instance,
    check_int,
)
from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.proxies.energy_net import EnergyConfig
from sbi_jeffreys.proxies.experts import Expert, check_experts

__all__ = ["JeffreysOptions", "Preset"]

Preset = Literal["fast", "default", "thorough"]
_PROXIES = ("auto", "likelihood", "energy")


@dataclass(frozen=True)
class JeffreysOptions:
    """Options of `NPE_Jeffreys`; the defaults are what the benchmark ran with.

    Attributes:
        proxy: "likelihood" (a density of x; vector-valued x), "energy" (a learned log-ratio;
            structured x), "auto" (an energy times a likelihood of summaries where the main has a
            trainable embedding net; a likelihood for vector x without a net, or of the summaries
            of a net without trainable parameters; else energy), or a `Proxy` of your own, for
            instance `GivenProxy`. A proxy that has something to fit is copied first.
        experts: Flows and regressions of the likelihood proxy. None: `DEFAULT_EXPERTS`, or, for
            more than 30 outputs, `WIDE_EXPERTS`, whose cost grows slowly with that number.
        proxy_fit: How the likelihood nets are fitted.
        proxy_folds: How many fits of each member of the likelihood proxy, to parts of the training
            simulations, are averaged (see `LikelihoodProxy`): the proxy gets better and takes as
            many times longer. None: 1 where the main has a trainable embedding net; otherwise 10
            for 20 to 149 training simulations, 5 for 150 to 299, and 1 for any other number.
        energy: The energy proxy's network and fit.
        num_steps: Gradient steps of the symmetric stage; its learning rate is annealed over them.
            None: half as many again as plain NPE took (a main that was hard to fit to the
            simulations is hard to fit to the proxy), between 600 and 1,000. Both bounds grow as
            (N / 1,000)^0.8 from 1,000 simulations on, since a proxy of more simulations has more
            detail that the main has to fit: 3,786 and 6,310 at 10,000.
        stage_length: Factor on the default of `num_steps`.
        max_doublings: How often the stage may be made twice as long where main and proxy are far
            apart at half of its length; for a second time they would have to be twice as far apart.
            Where they are close, the stage ends at three quarters of its length. An explicit
            `num_steps` is not changed.
        steps_per_epoch: Steps between held-out evaluations and multiplier updates.
        learning_rate_factor: Peak learning rate of the symmetric stage as a multiple of `train`'s
            `learning_rate`. None: 30; 20 where the proxy, such as an energy, cannot draw x, because
            embedding nets diverge at larger steps.
        proxy_draws: Size of the pool of pairs drawn from the proxy. Steps draw from it again and
            again: too small a pool is overfitted like too few simulations. None: 100 for each
            step, at most a million (10,000 in later rounds), and at most 80 megabytes of x.
        proxy_batch_size: Proxy pairs per step for the forward term on the proxy.
        reverse_batch_size: Observations per step for the reverse term.
        reverse_samples: Samples of θ per observation for the reverse term, at least 2.
        reverse_barrier: Nats from the typical log ratio at which the ratios of samples outside the
            prior, in a far tail, or alone in the proxy's mass are bounded.
        adaptive: Whether multipliers, slack, trust and temperature adapt. If False, λ stays at
            `initial_multiplier`, and trust and temperature are 1: a penalty of fixed weight.
        initial_multiplier: λ of the forward constraint at the start. None: 0.3 if λ adapts, since
            R removes mass between modes most easily at the start; 1 if not.
        max_multiplier: λ_max. At 10, R keeps some weight while the constraint is missed by several
            nats, which early on is no sign that the constraint cannot be met.
        slack_price: α: a held-out gap of one nat that persists drives λ to α.
        dual_step_size: How fast λ changes, in (0, 1]. By default it changes more slowly than the
            main, which early on misses the constraint even where it can be met.
        tolerance: Held-out gap, in nats, that the forward constraint allows without slack.
        temper: Whether the log-likelihood of a `LikelihoodProxy` is scaled by an inverse
            temperature γ, found on pairs that the fits have not seen; only if `adaptive`, and for
            at most 30 outputs or summaries. An energy is fitted by the same criterion already, and
            a `GivenProxy` is used as it is.
        min_trust: Below this trust in the proxy the symmetric stage is not run at all.
        marginal_transforms: Whether a main given by name or config gets x through marginal
            transforms (log of positive heavy-tailed outputs, …) and θ in the prior's unconstrained
            space. A `MainBuilder` has its own setting; other builders, such as sbi's
            `posterior_nn(...)`, are used as they are.
        checkpoint: File that a long training is saved to after plain NPE, after the proxy's fit,
            and during the symmetric stage. After a crash, `NPE_Jeffreys.load(path)` and
            `train(resume_training=True)` go on from there. None: no file.
        checkpoint_seconds: Least time between two checkpoints of the stage.

    Raises:
        TypeError, ValueError: Naming the field, what was expected and what came.

    Example:
        >>> JeffreysOptions(num_steps=500).num_steps
        500
    """

    proxy: Literal["auto", "likelihood", "energy"] | Proxy = "auto"
    experts: tuple[Expert, ...] | None = None
    proxy_fit: FitConfig = field(default_factory=FitConfig)
    proxy_folds: int | None = None
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    num_steps: int | None = None
    stage_length: float = 1.0
    max_doublings: int = 1
    steps_per_epoch: int = 30
    learning_rate_factor: float | None = None
    proxy_draws: int | None = None
    proxy_batch_size: int = 512
    reverse_batch_size: int = 50
    reverse_samples: int = 4
    reverse_barrier: float = 10.0
    adaptive: bool = True
    initial_multiplier: float | None = None
    max_multiplier: float = 10.0
    slack_price: float = 20.0
    dual_step_size: float = 0.1
    tolerance: float = 0.05
    temper: bool = True
    min_trust: float = 0.05
    marginal_transforms: bool = True
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not isinstance(self.proxy, Proxy):
            check_choice("proxy", self.proxy, _PROXIES)
        if self.experts is not None:
            check_experts(self.experts)
        check_instance("proxy_fit", self.proxy_fit, FitConfig)
        check_instance("energy", self.energy, EnergyConfig)
        for name in ("adaptive", "marginal_transforms", "temper"):
            check_bool(name, getattr(self, name))
        if self.checkpoint is not None:
            _check_path(self.checkpoint)
        by_default = [name for name in _NONE_ALLOWED if getattr(self, name) is None]
        for name, minimum in _INT_MINIMA.items():
            if name not in by_default:
                check_int(name, getattr(self, name), minimum)
        for name, (low, high, low_open) in _FLOAT_RANGES.items():
            if name not in by_default:
                check_float(name, getattr(self, name), low, high, low_open)
        if self.first_multiplier > self.max_multiplier:
            raise ValueError(
                f"initial_multiplier must not exceed max_multiplier ({self.max_multiplier}), "
                f"got {self.first_multiplier}; lower one or raise the other."
            )

    @classmethod
    def preset(cls, name: Preset) -> JeffreysOptions:
        """Options by how long training may take: "fast", "default" or "thorough".

        "fast" halves the symmetric stage and its batches of pairs from the proxy, never doubles the
        stage, and fits the proxy once instead of cross-fitting it, which takes most of the time
        with few simulations. "thorough" makes the stage three times as long, and doubles it at
        most once: with 1,000 simulations of three simulators, this gained 0.01 to 0.14 nats in
        twice the time.

        Raises:
            ValueError: If there is no preset of this name.

        Example:
            >>> JeffreysOptions.preset("thorough").steps_for(1_000)
            1800
        """
        return cls(**_PRESETS[check_choice("options", name, tuple(_PRESETS))])

    @property
    def first_multiplier(self) -> float:
        """`initial_multiplier`, or its default."""
        if self.initial_multiplier is not None:
            return self.initial_multiplier
        return min(0.3 if self.adaptive else 1.0, self.max_multiplier)

    def steps_for(self, num_simulations: int, plain_steps: int = 0) -> int:
        """`num_steps`, or its default.

        Args:
            num_simulations: Number of simulations of all rounds in use.
            plain_steps: Gradient steps that plain NPE took on them.

        Example:
            >>> [JeffreysOptions().steps_for(1_000, steps) for steps in (200, 600, 2_000)]
            [600, 900, 1000]
        """
        if self.num_steps is not None:
            return self.num_steps
        growth = max(1.0, num_simulations / 1000) ** _GROWTH  # mutant: as-long-for-many-simulations
        low, high = (round(bound * growth) for bound in _STEPS)
        steps = min(max(low, round(_STEPS_OVER_PLAIN * plain_steps)), high)
        return max(1, round(self.stage_length * steps))  # mutant: stage-length-dead

    def draws_for(self, num_steps: int, dim_x: int = 1) -> int:
        """`proxy_draws`, or its default for so many steps and outputs."""
        if self.proxy_draws is not None:
            return self.proxy_draws
        most = min(_MAX_DRAWS, _MAX_ELEMENTS // dim_x)
        return min(max(1, _DRAWS_PER_STEP * num_steps), most)


_PRESETS: dict[str, dict[str, Any]] = {
    "fast": {
        "stage_length": 0.5,
        "max_doublings": 0,
        "proxy_batch_size": 256,
        "proxy_folds": 1,
    },
    "default": {},
    "thorough": {"stage_length": 3.0},
}
# Fields in which None stands for a default that is computed
_NONE_ALLOWED = (
    "initial_multiplier",
    "learning_rate_factor",
    "num_steps",
    "proxy_draws",
    "proxy_folds",
)
_STEPS, _GROWTH = (600, 1000), 0.8
_STEPS_OVER_PLAIN = 1.5
_DRAWS_PER_STEP, _MAX_DRAWS, _MAX_ELEMENTS = 100, 1_000_000, 20_000_000
_INT_MINIMA = {
    "proxy_folds": 1,
    "num_steps": 0,
    "max_doublings": 0,
    "steps_per_epoch": 1,
    "proxy_draws": 1,
    "proxy_batch_size": 1,
    "reverse_batch_size": 1,
    "reverse_samples": 2,
}
_INF = float("inf")
_FLOAT_RANGES = {  # lower end, upper end, whether the lower end is excluded
    "stage_length": (0.0, _INF, True),
    "learning_rate_factor": (0.0, _INF, True),
    "reverse_barrier": (0.0, _INF, True),
    "initial_multiplier": (0.0, _INF, False),
    "max_multiplier": (0.0, _INF, True),
    "slack_price": (0.0, _INF, True),
    "dual_step_size": (0.0, 1.0, True),
    "tolerance": (0.0, _INF, False),
    "min_trust": (0.0, 1.0, False),
    "checkpoint_seconds": (0.0, _INF, False),
}


def _check_path(path: Any) -> None:
    """Refuse a path to which no file can be written."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"checkpoint must be a path or None, got {type(path).__name__} ({path!r}); pass the "
            "name of a file."
        )
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise ValueError(
            f"checkpoint must be a file in a folder that exists, got {str(path)!r}; make the "
            "folder, or name a file in it."
        )

"""Variants of the symmetric stage that start from the same stage 0 and the same proxy.

`ForkableNPE` halts before the symmetric stage; `fork` runs that stage from there, under other
options or with a term switched off, as often as asked. All forks continue one random stream, so the
default variant is what `NPE_Jeffreys` would have trained, and the others differ from it in nothing
but what they say.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sbi_jeffreys import JeffreysOptions, NPE_Jeffreys
from sbi_jeffreys.benchmark._running import NoTracker
from sbi_jeffreys.proxies import FlowExpert, LikelihoodProxy
from sbi_jeffreys.training.stage import SymmetricStage

__all__ = ["CONDITIONS", "VARIANTS", "Condition", "ForkableNPE", "KeptProxy", "Variant"]

#: Changes a stage that is about to run; the trainer it belongs to has the simulations.
Edit = Callable[[SymmetricStage, NPE_Jeffreys], None]


class ForkableNPE(NPE_Jeffreys):
    """`NPE_Jeffreys` that trains stage 0 and leaves the symmetric stage to its forks."""

    _halted: tuple[Any, ...] | None = None
    _edit: Edit | None = None
    _is_fork = False

    def fork(self, options: JeffreysOptions, edit: Edit | None = None) -> ForkableNPE:
        """A copy of the trainer that has gone through the symmetric stage under these options.

        Args:
            options: Of the symmetric stage; a proxy given in them is shared, not copied.
            edit: Called with the stage and its trainer just before it runs, if it runs.

        Raises:
            RuntimeError: If stage 0 is not trained yet.
        """
        if self._halted is None:
            raise RuntimeError("There is nothing to fork from. Call train() first.")
        twin = deepcopy(self)
        assert twin._halted is not None
        twin._tracker = NoTracker()  # sbi's copies open a new one
        twin.options, twin._edit, twin._is_fork = options, edit, True
        with twin._own_randomness():
            twin._train_symmetric(*twin._halted)
        return twin

    def _train_symmetric(self, *arguments: Any) -> int:
        """Halt here the first time."""
        if self._is_fork:
            return super()._train_symmetric(*arguments)
        self._halted = arguments
        return 0

    def _prepare_stage(self, *arguments: Any) -> None:
        """The library's, and then the edit, where the stage is to run."""
        super()._prepare_stage(*arguments)
        if self._stage is not None and self._edit is not None:
            self._edit(self._stage, self)


class KeptProxy(LikelihoodProxy):
    """A likelihood proxy that is fitted once: every further `fit` finds it as the first left it.

    That includes the random state after the fit, so that what follows does not depend on who was
    first.
    """

    _state_after: Tensor | None = None

    def fit(self, theta: Tensor, x: Tensor, *arguments: Any, **kwargs: Any) -> LikelihoodProxy:
        """See `LikelihoodProxy.fit`."""
        if self._state_after is None:
            self._fit_once(theta, x, *arguments, **kwargs)
            self._state_after = torch.get_rng_state()
        torch.set_rng_state(self._state_after)
        return self

    def _fit_once(self, theta: Tensor, x: Tensor, *arguments: Any, **kwargs: Any) -> None:
        super().fit(theta, x, *arguments, **kwargs)


class ShuffledProxy(KeptProxy):
    """Broken: fitted to pairs whose θ do not belong to their x, so it knows the prior only."""

    def _fit_once(self, theta: Tensor, x: Tensor, *arguments: Any, **kwargs: Any) -> None:
        super()._fit_once(theta[torch.randperm(len(theta))], x, *arguments, **kwargs)


class RawCountsProxy(KeptProxy):
    """Broken on integer-valued x: neither dequantised nor transformed.

    The nets see x a quarter off the integers, where no dimension looks like counts: a density of
    points, whose likelihood grows without bound.
    """

    _OFF = 0.25

    def _fit_once(self, theta: Tensor, x: Tensor, *arguments: Any, **kwargs: Any) -> None:
        super()._fit_once(theta, x + self._OFF, *arguments, **kwargs)

    def log_factor(self, theta: Tensor, x: Tensor) -> Tensor:
        """See `LikelihoodProxy.log_factor`."""
        return super().log_factor(theta, x + self._OFF)

    def sample_given(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """See `LikelihoodProxy.sample_given`."""
        kept, x = super().sample_given(theta)
        return kept, x - self._OFF


def _nets(options: JeffreysOptions) -> list[FlowExpert]:
    return [member for member in options.experts if isinstance(member, FlowExpert)]


def _undertrained(options: JeffreysOptions) -> JeffreysOptions:
    """Two epochs, and the nets alone: regressions in closed form would carry the proxy."""
    config = replace(options.proxy_fit, max_epochs=2)
    return replace(options, proxy_fit=config, experts=tuple(_nets(options)))


def _raw_members(options: JeffreysOptions) -> JeffreysOptions:
    """The nets alone, on x as it is: a regression's scale would be chosen by the proxy."""
    raw = dict.fromkeys(replace(net, marginal_transform=False) for net in _nets(options))
    return replace(options, experts=tuple(raw))


@dataclass(frozen=True)
class Condition:
    """How a row's proxy comes about.

    Attributes:
        label: In tables.
        kind: Class of the proxy.
        change: What it changes in the options that the proxy is built from.
    """

    label: str
    kind: type[KeptProxy] = KeptProxy
    change: Callable[[JeffreysOptions], JeffreysOptions] = field(default=lambda options: options)

    def build(self, trainer: NPE_Jeffreys, options: JeffreysOptions) -> KeptProxy:
        """The proxy, not fitted yet."""
        changed = self.change(options)
        return self.kind(trainer._prior, changed.experts, changed.proxy_fit, changed.proxy_folds)


CONDITIONS = {
    "good": Condition("as fitted"),
    "shuffled": Condition("broken: fitted to shuffled θ", ShuffledProxy),
    "undertrained": Condition("broken: nets of two epochs", change=_undertrained),
    "raw": Condition("broken: raw counts", RawCountsProxy, _raw_members),
}


def _without(name: str) -> Edit:
    """The objective without one term; it stays in the graph, with weight zero."""

    def edit(stage: SymmetricStage, trainer: NPE_Jeffreys) -> None:
        weigh = stage.weigh

        def weigh_without(terms: dict[str, Tensor]) -> Tensor:
            return weigh({key: 0 * term if key == name else term for key, term in terms.items()})

        stage.weigh = weigh_without  # type: ignore[method-assign]

    return edit


def _reverse_on_real_x(stage: SymmetricStage, trainer: NPE_Jeffreys) -> None:
    """R at the training simulations' x; G stays on the proxy's pairs."""
    theta, x, _ = trainer.get_simulations()
    rows, all_terms = trainer.train_indices, stage._terms
    real_pool = {
        "pool_theta": theta[rows],
        "pool_x": x[rows],
        "pool_weights": torch.ones(len(rows)),
    }

    def terms(real: tuple[Tensor, Tensor, Tensor] | None, with_reverse: bool) -> dict[str, Tensor]:
        found = all_terms(real, with_reverse=False)
        if with_reverse:
            kept = {name: getattr(stage, name) for name in real_pool}
            vars(stage).update(real_pool)
            found["reverse"] = all_terms(None, with_reverse=True)["reverse"]
            vars(stage).update(kept)
        return found

    stage._terms = terms  # type: ignore[method-assign]


@dataclass(frozen=True)
class Variant:
    """One way of running the symmetric stage.

    Attributes:
        label: In tables.
        changes: Of the default options.
        edit: Of the stage.
        broken_rows: Whether it is run where the proxy is broken.
    """

    label: str
    changes: dict[str, Any] = field(default_factory=dict)
    edit: Edit | None = None
    broken_rows: bool = False


def _frozen(multiplier: float) -> Variant:
    changes = {"adaptive": False, "initial_multiplier": multiplier}
    return Variant(f"frozen, λ = {multiplier:g}", changes, broken_rows=True)


#: By name, in the order of the table; plain NPE, which they all start from, stands before them.
VARIANTS = {
    "adaptive": Variant("adaptive (default)", broken_rows=True),
    "frozen_0.3": _frozen(0.3),
    "frozen_1": _frozen(1.0),
    "frozen_10": _frozen(10.0),
    "without_forward": Variant("without F", edit=_without("forward")),
    "without_generated": Variant("without G", edit=_without("generated")),
    "without_reverse": Variant("without R", edit=_without("reverse")),
    "without_temper": Variant("without temperature", {"temper": False}, broken_rows=True),
    "real_x": Variant("R at real x", edit=_reverse_on_real_x),
}

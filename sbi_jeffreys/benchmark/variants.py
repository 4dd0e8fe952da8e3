"""Variants of the symmetric stage that start from the same stage 0 and the same proxy.

`ForkableNPE` stops before the symmetric stage; each `fork` runs that stage from there, under other
options or with a term switched off. All forks continue one random stream, so the default variant is
what `NPE_Jeffreys` would have trained, and the other variants differ from it only as stated.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from sbi_jeffreys import JeffreysOptions, NPE_Jeffreys, _sbi
from sbi_jeffreys._sbi import NoTracker
from sbi_jeffreys.proxies import FlowExpert, LikelihoodProxy
from sbi_jeffreys.proxies.experts import DEFAULT_EXPERTS
from sbi_jeffreys.training.loss import PERIOD, RealBatch, SymmetricLoss, weigh
from sbi_jeffreys.training.pool import Pool
from sbi_jeffreys.training.stage import SymmetricStage
from sbi_jeffreys.training.training import Training

#: Changes a stage that is about to run; the stage's trainer has the simulations.
Edit = Callable[[SymmetricStage, NPE_Jeffreys], None]


class StageZero(Training):
    """A training that ends with plain NPE as it is, from which the forks continue."""

    def _keep_plain(self, *arguments: Any) -> None:
        """Do nothing: train no second plain NPE, whose time the forks would be charged for."""


class ForkedTraining(Training):
    """A training that continues from another's plain NPE, with an edit of its symmetric stage."""

    def __init__(self, origin: Training, edit: Edit | None) -> None:
        super().__init__()
        vars(self).update(vars(origin))
        self._edit = edit

    def _train_plain(self, *arguments: Any) -> None:
        """Do nothing: plain NPE is trained already."""

    def _prepare(self, trainer: Any, *arguments: Any) -> None:
        super()._prepare(trainer, *arguments)
        if self.stage is not None and self._edit is not None:
            self._edit(self.stage, trainer)


class ForkableNPE(NPE_Jeffreys):
    """`NPE_Jeffreys` that trains plain NPE and leaves the symmetric stage to its forks."""

    def __init__(self, *arguments: Any, **kwargs: Any) -> None:
        options = kwargs.pop("options", None) or JeffreysOptions()
        super().__init__(*arguments, options=replace(options, num_steps=0), **kwargs)
        self._training = StageZero()
        self._train_kwargs: dict[str, Any] = {}

    def train(self, **kwargs: Any) -> Any:
        """See `NPE_Jeffreys.train`; forks train under the same arguments."""
        self._train_kwargs = kwargs
        return super().train(**kwargs)

    def fork(self, options: JeffreysOptions, edit: Edit | None = None) -> ForkableNPE:
        """A copy of the trainer that has gone through the symmetric stage under these options.

        Args:
            options: Options of the symmetric stage; their proxy is shared, not copied.
            edit: Called with the stage and its trainer just before the stage runs, if it runs.

        Raises:
            RuntimeError: If plain NPE is not trained yet.
        """
        if not hasattr(self, "train_indices"):
            raise RuntimeError("There is nothing to fork from. Call train() first.")
        twin = deepcopy(self)
        _sbi.set_tracker(twin, NoTracker())  # a copy by sbi opens a new tracker
        twin.options = options
        twin._training = ForkedTraining(twin._training, edit)
        twin.train(**self._train_kwargs, resume_training=True)
        return twin


class KeptProxy(LikelihoodProxy):
    """A likelihood proxy that is fitted once: every further `fit` changes nothing.

    Every `fit` ends in the random state that the first one ended in, so that the order of the
    variants does not matter.
    """

    _state_after: Tensor | None = None

    def fit(self, theta: Tensor, x: Tensor, *arguments: Any, **kwargs: Any) -> LikelihoodProxy:
        if self._state_after is None:
            super().fit(*self.seen(theta, x), *arguments, **kwargs)
            self._state_after = torch.get_rng_state()
        torch.set_rng_state(self._state_after)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptProxy:
        """The proxy itself: the trainers of all variants share its one fit."""
        return self

    def seen(self, theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs that the proxy is fitted to, given the training pairs."""
        return theta, x


class ShuffledProxy(KeptProxy):
    """Broken: fitted to pairs whose θ do not belong to their x, so it learns the prior only."""

    def seen(self, theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return theta[torch.randperm(len(theta))], x


class RawCountsProxy(KeptProxy):
    """Broken on integer-valued x: neither dequantised nor transformed.

    The nets see x a quarter off the integers, where no dimension looks like counts. They fit a
    density to points, whose likelihood grows without bound.
    """

    _OFF = 0.25

    def seen(self, theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return theta, x + self._OFF

    def log_factor(self, theta: Tensor, x: Tensor) -> Tensor:
        return super().log_factor(theta, x + self._OFF)

    def sample_given(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        kept, x = super().sample_given(theta)
        return kept, x - self._OFF


def _nets(options: JeffreysOptions) -> list[FlowExpert]:
    experts = options.experts or DEFAULT_EXPERTS
    return [expert for expert in experts if isinstance(expert, FlowExpert)]


def _undertrained(options: JeffreysOptions) -> JeffreysOptions:
    """Two epochs, and no experts but nets, because regressions in closed form would suffice."""
    config = replace(options.proxy_fit, max_epochs=2)
    return replace(options, proxy_fit=config, experts=tuple(_nets(options)))


def _raw_members(options: JeffreysOptions) -> JeffreysOptions:
    """No experts but nets, and x as it is: the proxy would choose a regression's scale itself."""
    raw = dict.fromkeys(replace(net, marginal_transform=False) for net in _nets(options))
    return replace(options, experts=tuple(raw))


@dataclass(frozen=True)
class Condition:
    """How a row's proxy is made.

    Attributes:
        label: What tables call it.
        kind: Class of the proxy.
        change: Changes the options that the proxy is built from.
    """

    label: str
    kind: type[KeptProxy] = KeptProxy
    change: Callable[[JeffreysOptions], JeffreysOptions] = field(default=lambda options: options)

    def build(self, prior: Distribution, options: JeffreysOptions) -> KeptProxy:
        """The proxy, not fitted yet."""
        changed = self.change(options)
        return self.kind(prior, changed.experts, changed.proxy_fit, changed.proxy_folds)


CONDITIONS = {
    "good": Condition("as fitted"),
    "shuffled": Condition("broken: fitted to shuffled θ", ShuffledProxy),
    "undertrained": Condition("broken: nets of two epochs", change=_undertrained),
    "raw": Condition("broken: raw counts", RawCountsProxy, _raw_members),
}


@dataclass
class WithoutTerm:
    """The objective without one term, which stays in the graph with weight zero."""

    loss: SymmetricLoss
    name: str

    def __call__(
        self, step: int, multiplier: Tensor, next_real: Callable[[], RealBatch]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self.loss.terms(step, next_real)
        kept = {key: 0 * term if key == self.name else term for key, term in terms.items()}
        return weigh(kept, multiplier, self.loss.trust), terms


@dataclass
class ReverseAtRealX:
    """The objective with R at the training simulations' x, and G on the proxy's pairs."""

    loss: SymmetricLoss
    real: SymmetricLoss

    def __call__(
        self, step: int, multiplier: Tensor, next_real: Callable[[], RealBatch]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with_reverse = step % PERIOD == 0
        terms = self.loss.terms(PERIOD - 1 if with_reverse else step, next_real)
        if with_reverse:
            terms["reverse"] = self.real.terms(0, next_real)["reverse"]
        return weigh(terms, multiplier, self.loss.trust), terms


def _without(name: str) -> Edit:
    def edit(stage: SymmetricStage, trainer: NPE_Jeffreys) -> None:
        assert isinstance(stage.loss, SymmetricLoss)
        stage.loss = WithoutTerm(stage.loss, name)

    return edit


def _reverse_on_real_x(stage: SymmetricStage, trainer: NPE_Jeffreys) -> None:
    theta, x, _ = trainer.get_simulations()
    rows, loss = trainer.train_indices, stage.loss
    assert isinstance(loss, SymmetricLoss)
    pool = Pool(theta[rows], x[rows], torch.ones(len(rows)))
    real = SymmetricLoss(loss.main, loss.proxy, pool, loss.options, loss.trust)
    stage.loss = ReverseAtRealX(loss, real)


@dataclass(frozen=True)
class Variant:
    """One way of running the symmetric stage.

    Attributes:
        label: What tables call it.
        changes: Changes of the default options.
        edit: Change of the stage.
        broken_rows: Whether it runs in rows with a broken proxy.
    """

    label: str
    changes: dict[str, Any] = field(default_factory=dict)
    edit: Edit | None = None
    broken_rows: bool = False


def _frozen(multiplier: float) -> Variant:
    changes = {"adaptive": False, "initial_multiplier": multiplier}
    return Variant(f"frozen, λ = {multiplier:g}", changes, broken_rows=True)


#: By name, in the order of the table, which begins with plain NPE, where all of them start.
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

"""The methods under comparison, by name, each trained on the same simulations.

A method names the *training* that it uses. Methods of one training share what they train in a cell:
`npe_jeffreys` and its corrected draws are one training, and the ensembles reuse `npe_nsf` as their
first member. Add your own:

    register_method(MyMethod())      # name, label, training, fit(…)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from sbi_jeffreys import FlowExpert, JeffreysOptions, MainBuilder, NPE_Jeffreys
from sbi_jeffreys._sbi import NoTracker
from sbi_jeffreys.benchmark._running import derive_seed, measured, quiet, seeded
from sbi_jeffreys.benchmark.fitted import (
    CorrectedFit,
    EstimatorFit,
    FittedMethod,
    RefitFit,
    SamplerFit,
    corrected_posterior,
    focused_posterior,
)
from sbi_jeffreys.benchmark.tasks import Task
from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.training.report import ProxyStatus

_TRACES_KEPT = ("epochs_trained", "best_validation_loss", "proxy", "proxy_held_out")


@dataclass
class FitContext:
    """How to fit, and what methods of one cell share.

    Attributes:
        show_progress: Whether sbi prints and shows bars.
        fast: Whether to take a few steps only, which shows that everything runs.
        shared: Trainings of this cell by name.
    """

    show_progress: bool = False
    fast: bool = False
    shared: dict[Any, Any] = field(default_factory=dict)

    @property
    def train_kwargs(self) -> dict[str, Any]:
        """Arguments of sbi's `train`: its defaults, except in smoke runs."""
        return {"max_num_epochs": 3} if self.fast else {}

    @property
    def trainer_kwargs(self) -> dict[str, Any]:
        """Arguments of the constructors of sbi's trainers that have nothing to do with training."""
        return {"show_progress_bars": self.show_progress, "tracker": NoTracker()}

    def options(self, **changes: Any) -> JeffreysOptions:
        """Options of `NPE_Jeffreys`: the defaults with `changes`, shrunk for smoke runs."""
        options = JeffreysOptions(**changes)
        return replace(options, **_FAST) if self.fast else options


_FAST: dict[str, Any] = {
    "num_steps": 20,
    "steps_per_epoch": 10,
    "experts": (FlowExpert("maf"),),
    "proxy_fit": FitConfig(max_epochs=3),
    "proxy_folds": 1,
    "proxy_draws": 200,
    "proxy_batch_size": 50,
    "reverse_batch_size": 20,
    "min_trust": 0.0,
}


@runtime_checkable
class Method(Protocol):
    """A method under comparison.

    Attributes:
        name: Identifier on the command line and in result files.
        label: How tables and figures call it.
        training: Methods with the same value run in the same cell and share its trainings.
    """

    @property
    def name(self) -> str: ...

    @property
    def label(self) -> str: ...

    @property
    def training(self) -> str: ...

    def fit(
        self, task: Task, theta: Tensor, x: Tensor, seed: int, context: FitContext
    ) -> FittedMethod:
        """Train on simulations `(N, D)`, `(N, dim_x)`; everything random follows from `seed`."""
        ...


@dataclass
class Trained:
    """A trained inference object of sbi's with its posterior and its cost."""

    inference: Any
    posterior: Any
    cost: dict[str, float]

    @property
    def info(self) -> dict[str, Any]:
        """Cost, excerpts of the summary, and `fell_back` if no proxy was used: plain NPE."""
        summary, ours = self.inference.summary, isinstance(self.inference, NPE_Jeffreys)
        kept = {key: list(summary[key]) for key in _TRACES_KEPT if key in summary}
        epochs = kept.pop("epochs_trained", [])
        fell_back = {"fell_back": True} if ours and not proxy_is_usable(self.inference) else {}
        return {**self.cost, "epochs": int(sum(epochs)) if epochs else None, **kept, **fell_back}


def train(
    make: Callable[[], Any], theta: Tensor, x: Tensor, seed: int, context: FitContext, key: Any
) -> Trained:
    """Build, train and measure an inference object of sbi's, on its own random stream.

    A training that the context already holds under the same key is returned as it is.
    """
    if key not in context.shared:
        with seeded(seed), quiet(not context.show_progress, ours=True):
            with measured() as cost:
                inference = make()
                inference.append_simulations(theta, x).train(**context.train_kwargs)
            posterior = inference.build_posterior()
        context.shared[key] = Trained(inference, posterior, dict(vars(cost)))
    return context.shared[key]


def main_network(task: Task, name: str, builder: Callable[..., Any] = MainBuilder) -> Any:
    """sbi's density estimator of that name, with the task's embedding net where x is no vector.

    Without an embedding net the name is returned itself; with one, what `builder` makes of both.
    """
    embedding_net = task.embedding_net()
    return name if embedding_net is None else builder(name, embedding_net=embedding_net)


@dataclass(frozen=True)
class TrainerMethod:
    """A method that one of sbi's trainers, or ours, trains; see `Method`.

    Attributes:
        make: The trainer for a task, without simulations yet.
        wrap: What the benchmark samples from after training.
        num_members: Independently initialised networks that are trained.
    """

    name: str
    label: str
    training: str
    make: Callable[[Task, FitContext], Any]
    wrap: Callable[[list[Trained], FitContext], FittedMethod]
    num_members: int = 1

    def fit(
        self, task: Task, theta: Tensor, x: Tensor, seed: int, context: FitContext
    ) -> FittedMethod:
        make, members = partial(self.make, task, context), []
        for k in range(self.num_members):
            member_seed = seed if k == 0 else derive_seed("member", seed, k)
            members.append(train(make, theta, x, member_seed, context, (self.training, k)))
        return self.wrap(members, context)


def _npe(task: Task, context: FitContext, name: str = "nsf") -> Any:
    """sbi's NPE."""
    from sbi.inference import NPE
    from sbi.neural_nets import posterior_nn

    return NPE(task.prior, main_network(task, name, posterior_nn), **context.trainer_kwargs)


def _jeffreys(task: Task, context: FitContext, name: str = "nsf", **changes: Any) -> NPE_Jeffreys:
    """`NPE_Jeffreys` under the default options with changes."""
    network, options = main_network(task, name), context.options(**changes)
    return NPE_Jeffreys(task.prior, network, options=options, **context.trainer_kwargs)


def _other(task: Task, context: FitContext, trainer: str) -> Any:
    """Another trainer of sbi's, with its defaults."""
    import sbi.inference

    return getattr(sbi.inference, trainer)(task.prior, **context.trainer_kwargs)


def _estimators(members: list[Trained], context: FitContext) -> EstimatorFit:
    """The members' networks; costs are sums over members, but peaks the largest."""
    infos = [member.info for member in members]
    info = infos[0]
    if len(infos) > 1:
        info = {key: sum(i[key] for i in infos) for key in ("seconds", "cpu_seconds", "epochs")}
        info |= {key: max(i[key] for i in infos) for key in ("peak_mib", "resident_mib")}
    return EstimatorFit(info=info, posteriors=[member.posterior for member in members])


def _sampler(members: list[Trained], context: FitContext) -> SamplerFit:
    return SamplerFit(info=members[0].info, posterior=members[0].posterior)


def _variational(members: list[Trained], context: FitContext) -> RefitFit:
    """Variational inference on a trained NLE at each x: the reverse divergence alone.

    sbi's amortised one does not train under a bounded prior: its flow leaves the support.
    """
    steps = {"max_num_iters": 3} if context.fast else {}

    def posterior_at(x: Tensor) -> Any:
        posterior = members[0].inference.build_posterior(sample_with="vi").set_default_x(x[None])
        return posterior.train(show_progress_bar=False, **steps)

    return RefitFit(info=members[0].info, posterior_at=posterior_at)


def _corrected(
    members: list[Trained], context: FitContext, power: float | None = None
) -> FittedMethod:
    """Draws corrected through the proxy, or uncorrected ones where no proxy was trusted.

    With power 1 they are draws of the proxy alone, for which the main is the proposal.
    """
    main, inference = _estimators(members, context), members[0].inference
    if not proxy_is_usable(inference):
        return main
    posterior = corrected_posterior(inference, context.fast, power)
    return CorrectedFit(info=main.info, main=main, posterior=posterior)


def _focused(members: list[Trained], context: FitContext) -> FittedMethod:
    """The main refined at each observation, or as it is where no proxy was trusted."""
    main, inference = _estimators(members, context), members[0].inference
    if not proxy_is_usable(inference):
        return main
    focus = partial(focused_posterior, inference, fast=context.fast)
    return RefitFit(info=main.info, posterior_at=focus)


def proxy_is_usable(inference: NPE_Jeffreys) -> bool:
    """Whether training found a proxy that it trusted, so that the symmetric stage used it."""
    report = inference.training_report
    return report is not None and report.proxy_status is ProxyStatus.USED


METHODS: dict[str, Method] = {}


def register_method(method: Method) -> Method:
    """Make a method known by its `name`; an existing method of that name is replaced.

    Raises:
        TypeError: If it lacks `name`, `label`, `training` or `fit`.
    """
    if not isinstance(method, Method):
        raise TypeError(
            f"method: expected name, label, training and fit(task, theta, x, seed, context), got "
            f"{type(method).__name__} without all of them; see sbi_jeffreys.benchmark.methods."
        )
    METHODS[method.name] = method
    return method


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: If there is none; the message lists the known ones.
    """
    if name not in METHODS:
        raise ValueError(
            f"name: expected one of {', '.join(METHODS)}, got {name!r}; add your own method with "
            "`register_method`."
        )
    return METHODS[name]


_NLE = partial(_other, trainer="NLE")
_MAF, _FIXED = partial(_jeffreys, name="maf"), partial(_jeffreys, adaptive=False)
for _method in (
    TrainerMethod("npe_nsf", "NPE", "npe_nsf", _npe, _estimators),
    TrainerMethod("npe_maf", "NPE (maf)", "npe_maf", partial(_npe, name="maf"), _estimators),
    TrainerMethod("ensemble2", "Ensemble of 2", "npe_nsf", _npe, _estimators, 2),
    TrainerMethod("ensemble5", "Ensemble of 5", "npe_nsf", _npe, _estimators, 5),
    TrainerMethod("nle_mcmc", "NLE + MCMC", "nle_mcmc", _NLE, _sampler),
    TrainerMethod("nle_vi", "NLE + VI", "nle_mcmc", _NLE, _variational),
    TrainerMethod("npe_jeffreys", "NPE_Jeffreys", "npe_jeffreys", _jeffreys, _estimators),
    TrainerMethod(
        "npe_jeffreys_corrected", "NPE_Jeffreys corrected", "npe_jeffreys", _jeffreys, _corrected
    ),
    TrainerMethod(
        "npe_jeffreys_proxy",
        "Proxy alone",
        "npe_jeffreys",
        _jeffreys,
        partial(_corrected, power=1.0),
    ),
    TrainerMethod(
        "npe_jeffreys_focused", "NPE_Jeffreys focused", "npe_jeffreys", _jeffreys, _focused
    ),
    TrainerMethod("npe_jeffreys_maf", "NPE_Jeffreys (maf)", "npe_jeffreys_maf", _MAF, _estimators),
    TrainerMethod(
        "npe_jeffreys_fixed", "NPE_Jeffreys (fixed)", "npe_jeffreys_fixed", _FIXED, _estimators
    ),
    TrainerMethod("fmpe", "FMPE", "fmpe", partial(_other, trainer="FMPE"), _sampler),
    TrainerMethod("npse", "NPSE", "npse", partial(_other, trainer="NPSE"), _sampler),
):
    register_method(_method)

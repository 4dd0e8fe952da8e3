"""The methods under comparison, by name, each trained on the same simulations.

A method says how it is fitted and which *training* it reads. Methods of one training share what
they train in a cell: `npe_jeffreys` and its corrected draws are one training, the ensembles reuse
`npe_nsf` as their first member. Add your own:

    register_method(MyMethod())      # name, label, training, fit(…)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from sbi_jeffreys import FlowExpert, JeffreysOptions, MainBuilder, NPE_Jeffreys
from sbi_jeffreys.benchmark._running import NoTracker, derive_seed, measured, quiet, seeded
from sbi_jeffreys.benchmark.fitted import CorrectedFit, EstimatorFit, FittedMethod, SamplerFit
from sbi_jeffreys.benchmark.tasks import Task
from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.training.report import ProxyStatus

__all__ = ["METHODS", "FitContext", "Method", "get_method", "register_method"]

_TRACES_KEPT = ("epochs_trained", "best_validation_loss", "proxy", "proxy_held_out")


@dataclass
class FitContext:
    """How to fit, and what methods of one cell share.

    Attributes:
        show_progress: Whether sbi prints and shows bars.
        fast: A few steps only: shows that everything runs, says nothing about quality.
        shared: Trainings of this cell by name; emptied with the cell.
    """

    show_progress: bool = False
    fast: bool = False
    shared: dict[Any, Any] = field(default_factory=dict)

    @property
    def train_kwargs(self) -> dict[str, Any]:
        """Arguments of sbi's `train`: its defaults, but for smoke runs."""
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
        """Cost, and what the inference object's summary says."""
        summary = self.inference.summary
        kept = {key: list(summary[key]) for key in _TRACES_KEPT if key in summary}
        epochs = kept.pop("epochs_trained", [])
        return {**self.cost, "epochs": int(sum(epochs)) if epochs else None, **kept}


def train(
    make: Callable[[], Any], theta: Tensor, x: Tensor, seed: int, context: FitContext, key: Any
) -> Trained:
    """Build, train and measure an inference object of sbi's, on its own random stream.

    A training that the context has under the same key already is returned as it is.
    """
    if key not in context.shared:
        with seeded(seed), quiet(not context.show_progress):
            with measured() as cost:
                inference = make()
                inference.append_simulations(theta, x).train(**context.train_kwargs)
            posterior = inference.build_posterior()
        context.shared[key] = Trained(inference, posterior, dict(vars(cost)))
    return context.shared[key]


def main_network(task: Task, name: str, builder: Callable[..., Any] = MainBuilder) -> Any:
    """sbi's density estimator of that name: the name itself, or a builder with the task's
    embedding net where x is not a vector (`MainBuilder` for ours, `posterior_nn` for sbi's)."""
    embedding_net = task.embedding_net()
    return name if embedding_net is None else builder(name, embedding_net=embedding_net)


@dataclass(frozen=True)
class _Named:
    """What tables, files and the command line need of a method; see `Method`."""

    name: str
    label: str
    training: str


@dataclass(frozen=True)
class NPEMethod(_Named):
    """sbi's NPE, or an ensemble of independently initialised ones on the same simulations."""

    density_estimator: str = "nsf"
    num_members: int = 1

    def fit(
        self, task: Task, theta: Tensor, x: Tensor, seed: int, context: FitContext
    ) -> FittedMethod:
        """See `Method.fit`. Cost of an ensemble: sums over members; the peak is the largest."""
        from sbi.inference import NPE
        from sbi.neural_nets import posterior_nn

        def make() -> NPE:
            network = main_network(task, self.density_estimator, posterior_nn)
            return NPE(task.prior, network, **context.trainer_kwargs)

        members = []
        for k in range(self.num_members):
            member_seed = seed if k == 0 else derive_seed("member", seed, k)
            key = (self.training, k)
            members.append(train(make, theta, x, member_seed, context, key))
        info = members[0].info
        if self.num_members > 1:
            infos = [member.info for member in members]
            info = {key: sum(i[key] for i in infos) for key in ("seconds", "cpu_seconds", "epochs")}
            info |= {key: max(i[key] for i in infos) for key in ("peak_mib", "resident_mib")}
        return EstimatorFit(info=info, posteriors=[member.posterior for member in members])


@dataclass(frozen=True)
class JeffreysMethod(_Named):
    """`NPE_Jeffreys`, or its draws corrected through the proxy."""

    density_estimator: str = "nsf"
    changes: tuple[tuple[str, Any], ...] = ()
    corrected: bool = False

    def fit(
        self, task: Task, theta: Tensor, x: Tensor, seed: int, context: FitContext
    ) -> FittedMethod:
        """See `Method.fit`."""

        def make() -> NPE_Jeffreys:
            network = main_network(task, self.density_estimator)
            options = context.options(**dict(self.changes))
            return NPE_Jeffreys(task.prior, network, options=options, **context.trainer_kwargs)

        trained = train(make, theta, x, seed, context, self.training)
        main = EstimatorFit(info=trained.info, posteriors=[trained.posterior])
        if not self.corrected:
            return main
        posterior = None
        if proxy_is_usable(trained.inference):
            num_candidates = 1000 if context.fast else 20_000
            posterior = trained.inference.build_corrected_posterior(num_candidates=num_candidates)
        return CorrectedFit(info=trained.info, main=main, posterior=posterior)


def proxy_is_usable(inference: NPE_Jeffreys) -> bool:
    """Whether training found a proxy that it trusted, so that the symmetric stage ran with it."""
    report = inference.training_report
    return report is not None and report.proxy_status is ProxyStatus.USED


@dataclass(frozen=True)
class SamplerMethod(_Named):
    """Another trainer of sbi's, with its defaults, whose posterior is only sampled from."""

    trainer: str

    def fit(
        self, task: Task, theta: Tensor, x: Tensor, seed: int, context: FitContext
    ) -> FittedMethod:
        """See `Method.fit`."""
        import sbi.inference

        def make() -> Any:
            return getattr(sbi.inference, self.trainer)(task.prior, **context.trainer_kwargs)

        trained = train(make, theta, x, seed, context, self.training)
        return SamplerFit(info=trained.info, posterior=trained.posterior)


METHODS: dict[str, Method] = {}


def register_method(method: Method) -> Method:
    """Make a method known by its `name`; one of that name that exists is replaced.

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


for _method in (
    NPEMethod("npe_nsf", "NPE", "npe_nsf"),
    NPEMethod("npe_maf", "NPE (maf)", "npe_maf", "maf"),
    NPEMethod("ensemble2", "Ensemble of 2", "npe_nsf", num_members=2),
    NPEMethod("ensemble5", "Ensemble of 5", "npe_nsf", num_members=5),
    SamplerMethod("nle_mcmc", "NLE + MCMC", "nle_mcmc", "NLE"),
    JeffreysMethod("npe_jeffreys", "NPE_Jeffreys", "npe_jeffreys"),
    JeffreysMethod(
        "npe_jeffreys_corrected", "NPE_Jeffreys corrected", "npe_jeffreys", corrected=True
    ),
    JeffreysMethod("npe_jeffreys_maf", "NPE_Jeffreys (maf)", "npe_jeffreys_maf", "maf"),
    JeffreysMethod(
        "npe_jeffreys_fixed", "NPE_Jeffreys (fixed)", "npe_jeffreys_fixed",
        changes=(("adaptive", False),),
    ),
    SamplerMethod("fmpe", "FMPE", "fmpe", "FMPE"),
    SamplerMethod("npse", "NPSE", "npse", "NPSE"),
):  # fmt: skip
    register_method(_method)

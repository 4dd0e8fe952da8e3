"""Flow experts: sbi's conditional density estimators of x given θ, fitted by maximum likelihood."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from sbi.neural_nets import likelihood_nn
from torch import Tensor, nn

from sbi_jeffreys._checks import check_bool, check_choice, check_float, check_int
from sbi_jeffreys._sbi import model_builders
from sbi_jeffreys.networks.fast_layers import with_fast_layers
from sbi_jeffreys.networks.fitting import FitResult
from sbi_jeffreys.networks.together import FitTask
from sbi_jeffreys.proxies.experts.base import (
    ExpertData,
    FittedExpert,
    NetworkExpert,
    Prepared,
)
from sbi_jeffreys.proxies.experts.gaussian import AroundRegression
from sbi_jeffreys.proxies.experts.regression import best_regression

__all__ = ["FlowExpert"]

# Of sbi's models, those that are a density of vector-valued x given θ.
_MODELS = sorted(set(model_builders) - {"mnle", "mnpe", "tabpfn"})
# Those of them that are no flow: sbi after 0.27 refuses a number of transforms for them.
_NO_FLOWS = ("made", "mdn")
# Those that `torch.func.vmap` can evaluate, because none of their steps depends on values.
_TOGETHER = ("maf",)


@dataclass(frozen=True)
class FlowExpert(NetworkExpert):
    """One likelihood net.

    Attributes:
        model: A model name of sbi's `likelihood_nn` (maf, nsf, maf_rqs, mdn, `zuko_maf`, …).
        weight_decay: Decoupled weight decay of the fit; None: that of the `FitConfig`.
        learning_rate: Step size of the fit; None: that of the `FitConfig`.
        num_transforms: Transforms of a flow; mdn and made have none.
        marginal_transform: Whether the net models T(x), or x on its own scale. Where T is the
            identity anyway, experts that differ in this alone are fitted once.
        around_regression: Whether the net models the whitened residuals of a regression on θ in
            place of x itself. The regression is the simplest one that no other clearly beats by its
            leave-one-out density.

    Raises:
        TypeError, ValueError: Naming the field, what was expected and what came.
    """

    expensive: ClassVar[bool] = True

    model: str = "maf"
    weight_decay: float | None = None
    learning_rate: float | None = None
    num_transforms: int = 5
    marginal_transform: bool = True
    around_regression: bool = False

    @property
    def name(self) -> str:
        """The model, and what it models where that is not x itself."""
        return f"{self.model} of residuals" if self.around_regression else self.model

    @property
    def suits_atoms(self) -> bool:  # type: ignore[override]
        """Whether the model is a spline flow, whose slope may change from one bin to the next."""
        return "nsf" in self.model or "rqs" in self.model

    def __post_init__(self) -> None:
        check_choice("model", self.model, _MODELS)
        if self.weight_decay is not None:
            check_float("weight_decay", self.weight_decay, 0.0)
        if self.learning_rate is not None:
            check_float("learning_rate", self.learning_rate, 0.0, low_open=True)
        check_int("num_transforms", self.num_transforms, 1)
        check_bool("marginal_transform", self.marginal_transform)
        check_bool("around_regression", self.around_regression)

    def on_one_scale(self) -> FlowExpert:
        """The settings with `marginal_transform=True`, whose value makes no difference then."""
        return replace(self, marginal_transform=True)

    @property
    def architecture(self) -> Hashable:
        """Affine autoregressive flows are fitted together, whatever they are flows of."""
        if self.model not in _TOGETHER:
            return None
        return self.model, self.num_transforms, self.learning_rate

    def prepare(
        self, data: ExpertData, before: Sequence[FittedExpert], abandon_above: float
    ) -> Prepared:
        """Build the net and its targets; see `NetworkExpert.prepare`."""
        transform = data.scales[0 if self.marginal_transform else 1]
        z, x, train = data.z, data.x, data.train
        y = transform(x)
        target, leave_one_out, regression = y[train], y, None
        if self.around_regression:
            regression = best_regression(before, transform, z[train], x[train])
            leave_one_out = regression.mean(z)
            # mutant: nets-of-residuals-seen
            leave_one_out[train] = regression.leave_one_out
            target = regression.whiten(target, z[train], regression.leave_one_out)
        no_flow = self.model in _NO_FLOWS  # mutant: transforms-for-every-expert
        size: dict[str, Any] = {} if no_flow else {"num_transforms": self.num_transforms}
        builder = likelihood_nn(self.model, **size)
        with warnings.catch_warnings():
            # sbi warns of flows of one output, as if of one θ; here they are experts beside others.
            warnings.filterwarnings("ignore", message="In one-dimensional output space")
            built = builder(z[train].cpu(), target.cpu())
        net: nn.Module = with_fast_layers(built).to(x.device)
        # Held-out losses are those of x, so that experts on different scales can be compared.
        log_det = transform.log_det(x[data.val]).mean()
        if regression is not None:
            # mutant: held-out-without-whitening
            log_det = log_det + regression.log_det(z[data.val]).mean()
        noisy = bool(transform.has_cells.any())  # otherwise y is the same at every step

        def batch(indices: Tensor, training: bool) -> tuple[Tensor, ...]:
            own = transform.dequantise(x[indices]) if noisy and training else y[indices]
            if regression is not None:
                own = regression.whiten(own, z[indices], leave_one_out[indices])
            return own, z[indices]

        def finish(result: FitResult) -> FittedExpert:
            # mutant: net-around-x-itself
            whole = net if regression is None else AroundRegression(net, regression)
            return data.fitted(self, whole, transform, result)

        own = {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}
        config = replace(data.config, **{k: v for k, v in own.items() if v is not None})
        task = FitTask(net, batch, _loss, train, data.val, config, -float(log_det), abandon_above)
        return Prepared(task, finish)


def _loss(net: Any, y: Tensor, z: Tensor) -> Tensor:
    """−log ℓ of pairs by one of sbi's estimators, shape `(B,)`."""
    return net.loss(y, z)

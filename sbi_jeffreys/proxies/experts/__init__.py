"""Experts: the density estimators of x given θ that a likelihood proxy mixes.

One file per kind. `EXPERT_KINDS` lists the kinds, and `DEFAULT_EXPERTS` what is fitted by default.
"""

from __future__ import annotations

from sbi_jeffreys.proxies.experts.base import Expert, ExpertData, FittedExpert
from sbi_jeffreys.proxies.experts.flow import FlowExpert
from sbi_jeffreys.proxies.experts.neural import NeuralRegressionExpert
from sbi_jeffreys.proxies.experts.regression import RegressionExpert

__all__ = [
    "DEFAULT_EXPERTS",
    "EXPERT_KINDS",
    "REGRESSIONS",
    "WIDE_EXPERTS",
    "Expert",
    "ExpertData",
    "FittedExpert",
    "FlowExpert",
    "NeuralRegressionExpert",
    "RegressionExpert",
    "check_experts",
]

#: The kinds of experts that options and proxies accept. Append a subclass of `Expert` to add one.
EXPERT_KINDS: list[type[Expert]] = [
    RegressionExpert,
    NeuralRegressionExpert,
    FlowExpert,
]

#: Experts that are fitted in a second or two.
REGRESSIONS: tuple[Expert, ...] = (
    RegressionExpert(1),
    RegressionExpert(2),
    RegressionExpert(2, sparse=True),
    RegressionExpert(2, sparse=True, heteroscedastic=True),
    RegressionExpert(1, kernel=True),
    RegressionExpert(1, mixture=True),
    RegressionExpert(2, mixture=True),
    RegressionExpert(2, sparse=True, mixture=True),
    RegressionExpert(2, sparse=True, heteroscedastic=True, mixture=True),
    RegressionExpert(1, kernel=True, mixture=True),
    NeuralRegressionExpert(),
    NeuralRegressionExpert(own_noise=True),
)

# The experts differ on purpose: a strongly decayed maf suits simple likelihoods, one without decay
# sharp ones, a spline flow skewed or one-dimensional x, a regression additive noise, a neural
# regression counts, signals and means that are not smooth enough for kernels (outputs with noise of
# their own: two signals of different noise), and a flow around a regression a smooth mean with
# noise that is not constant.
DEFAULT_EXPERTS: tuple[Expert, ...] = (
    *REGRESSIONS,
    NeuralRegressionExpert(num_layers=0),
    FlowExpert("maf", weight_decay=0.3, around_regression=True),
    FlowExpert("maf", weight_decay=0.3),
    FlowExpert("maf", weight_decay=1.0),
    FlowExpert("maf"),
    FlowExpert("maf", weight_decay=0.3, marginal_transform=False),
    FlowExpert("nsf", weight_decay=0.3, learning_rate=2e-3, num_transforms=3),
)

#: Experts whose cost grows slowly with the number of outputs.
WIDE_EXPERTS: tuple[Expert, ...] = (
    RegressionExpert(1),
    RegressionExpert(2),
    RegressionExpert(1, kernel=True),
    NeuralRegressionExpert(),
    NeuralRegressionExpert(own_noise=True),
    NeuralRegressionExpert(weight_decay=0.3),
    NeuralRegressionExpert(hidden_features=256, num_layers=2),
    NeuralRegressionExpert(num_layers=0),
)


def check_experts(experts: object) -> tuple[Expert, ...]:
    """Require a sequence, not empty, of experts of known kinds.

    Raises:
        TypeError: If it is anything else.
    """
    kinds = tuple(EXPERT_KINDS)
    known = isinstance(experts, (tuple, list)) and all(isinstance(e, kinds) for e in experts)
    if not known or not experts:
        names = ", ".join(kind.__name__ for kind in reversed(kinds))
        raise TypeError(
            f"experts must be a non-empty tuple of {names}, got {experts!r}; pass for instance "
            "(RegressionExpert(1), FlowExpert('maf'))."
        )
    return tuple(experts)  # type: ignore[arg-type]

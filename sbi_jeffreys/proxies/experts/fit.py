"""The members of the likelihood proxy: what they are, and which of them are worth fitting.

Regressions come first, in closed form. Then one net after the other, unless it falls hopelessly
behind its like, or the simplest model has already won: where a regression predicts held-out x
clearly better than a net does, and a net of its residuals finds nothing more in them, other nets
cost time and would get no weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from sbi.neural_nets import likelihood_nn
from torch import Tensor, nn

from sbi_jeffreys.networks.fitting import FitConfig, FitResult, fit_network
from sbi_jeffreys.networks.spline import with_fast_splines
from sbi_jeffreys.networks.transforms import MarginalTransform
from sbi_jeffreys.proxies.experts.kernel import KernelRegression
from sbi_jeffreys.proxies.experts.noise import fit_noise
from sbi_jeffreys.proxies.experts.regression import (
    AroundRegression,
    GaussianRegression,
    num_features,
)
from sbi_jeffreys.proxies.experts.specs import FlowExpert, RegressionExpert

__all__ = [
    "FittedExpert",
    "fit_experts",
    "fit_regression",
    "log_likelihood",
    "scales_of",
]

_CLEARLY = 2.0  # standard errors of the paired difference


@dataclass(frozen=True)
class FittedExpert:
    """A member after its fit.

    Attributes:
        net: The density estimator of T(x) given the transformed θ.
        transform: T.
        result: Held-out loss and epochs.
        held_out: log ℓ(x|θ) of the held-out pairs, shape `(M,)`.
        spec: What it was fitted from.
    """

    net: nn.Module
    transform: MarginalTransform
    result: FitResult
    held_out: Tensor
    spec: FlowExpert | RegressionExpert


def log_likelihood(net: nn.Module, transform: MarginalTransform, x: Tensor, z: Tensor) -> Tensor:
    """log ℓ(x|z) as a density of x for pairs `(N, ·)`, shape `(N,)`."""
    return net.log_prob(transform(x).unsqueeze(0), z)[0] + transform.log_det(x)  # type: ignore[operator]


def fit_experts(
    specs: Sequence[FlowExpert | RegressionExpert],
    config: FitConfig,
    z: Tensor,
    x: Tensor,
    train: Tensor,
    val: Tensor,
    on_epoch: Callable[[int, float], object] | None = None,
    scales: tuple[MarginalTransform, MarginalTransform] | None = None,
    stop: bool = True,
) -> list[FittedExpert]:
    """Fit regressions, then nets until they are clearly beaten or none is left.

    Args:
        specs: What to fit, nets in this order.
        config: How nets are fitted; a spec's own learning rate and decay take precedence.
        z: Transformed parameters `(N, D)`.
        x: Simulations `(N, dim_x)`.
        train: Indices of training pairs.
        val: Indices of held-out pairs.
        on_epoch: Called after every epoch of a net.
        scales: As from `scales_of`; by default those of the training pairs.
        stop: Whether to skip the nets that are left once a regression has won.

    Returns:
        The members fitted, at least one.
    """
    chosen, plain = scales_of(x[train]) if scales is None else scales
    regressions = [s for s in specs if isinstance(s, RegressionExpert)]
    nets = [s for s in specs if isinstance(s, FlowExpert)]
    if chosen.kinds == plain.kinds:
        nets = list(dict.fromkeys(replace(s, marginal_transform=True) for s in nets))
    fitted: list[FittedExpert] = []
    for spec in regressions:
        if spec.degree <= _max_degree(z[train]) or not nets:
            known = {m.spec: m.net for m in fitted}
            net = fit_regression(spec, chosen, z[train], x[train], known)
            with torch.no_grad():
                held_out = log_likelihood(net, chosen, x[val], z[val])
            result = FitResult(-float(held_out.mean()), 0)
            fitted.append(FittedExpert(net, chosen, result, held_out, spec))
    rivals = {True: FitResult(math.inf, 0), False: FitResult(math.inf, 0)}
    for spec in nets:
        transform = chosen if spec.marginal_transform else plain
        own = replace(config, learning_rate=spec.learning_rate, weight_decay=spec.weight_decay)
        rival = rivals[spec.around_regression]
        around = None
        if spec.around_regression:
            around = _best_regression(fitted, transform, z[train], x[train])
        member = _fit_net(spec, transform, own, z, x, train, val, on_epoch, rival, around)
        if member.result.early < rival.early:
            rivals[spec.around_regression] = member.result
        fitted.append(member)
        if stop and regression_won(fitted):
            break
    return fitted


def scales_of(x: Tensor) -> tuple[MarginalTransform, MarginalTransform]:
    """The scale chosen for x `(N, dim_x)`, and x's own."""
    return MarginalTransform.fit(x), MarginalTransform.fit(x, choose=False)


def regression_won(fitted: Sequence[FittedExpert]) -> bool:
    """Whether a regression clearly beats every net of x itself, and no net clearly beats it.

    Nets of both kinds must be there: of x, and of a regression's residuals. A failed fit, whose
    gain is NaN, settles nothing.
    """
    nets: dict[bool, list[Tensor]] = {True: [], False: []}  # by whether around a regression
    for member in fitted:
        if isinstance(member.spec, FlowExpert):
            nets[member.spec.around_regression].append(member.held_out)
    if not all(nets.values()):
        return False
    return any(
        all(_gain(member.held_out, net) > _CLEARLY for net in nets[False])
        and all(_gain(member.held_out, net) > -_CLEARLY for net in nets[True])
        for member in fitted
        if isinstance(member.spec, RegressionExpert)
    )


def _gain(ours: Tensor, theirs: Tensor) -> float:
    """Mean gain in standard errors of the paired difference; NaN where a fit failed."""
    gain = ours - theirs
    return float(gain.mean() / gain.std().clamp_min(1e-12) * math.sqrt(len(gain)))


def _max_degree(z: Tensor) -> int:
    """The degree of the polynomial that training pairs z `(N, D)` are enough for."""
    return 2 if num_features(z.shape[1], 2) <= len(z) // 2 else 1


def fit_regression(
    spec: RegressionExpert,
    transform: MarginalTransform,
    z: Tensor,
    x: Tensor,
    known: Mapping[FlowExpert | RegressionExpert, nn.Module] | None = None,
) -> GaussianRegression | AroundRegression:
    """The regression of T(x) on z, fitted to pairs `(N, ·)`.

    `known` are fits to the same pairs: one with Gaussian noise is where a mixture starts from.
    """
    y = transform.dequantise(x)
    net = (known or {}).get(replace(spec, mixture=False))
    if not isinstance(net, GaussianRegression):
        net = _fit_gaussian(spec, z, y)
    return fit_noise(net, z, y) if spec.mixture else net


def _fit_gaussian(spec: RegressionExpert, z: Tensor, y: Tensor) -> GaussianRegression:
    """The regression of y on z, with Gaussian noise, fitted to pairs `(N, ·)`."""
    dims = z.shape[1], y.shape[1]
    net = KernelRegression(*dims) if spec.kernel else GaussianRegression(*dims, spec.degree)
    return net.to(y.device).fit(z, y)


def _best_regression(
    fitted: Sequence[FittedExpert], transform: MarginalTransform, z: Tensor, x: Tensor
) -> GaussianRegression:
    """The simplest regression of T(x) on z that no other predicts pairs left out clearly better.

    Of the members fitted so far, or, where none is of T(x), of two fitted for the purpose. The
    simplest: residuals carry what a mean has overfitted, and narrow noise drowns in it.
    """
    own = [m.net for m in fitted if m.transform is transform]
    regressions = [net for net in own if isinstance(net, GaussianRegression)]
    if not regressions:
        specs = (RegressionExpert(_max_degree(z)), RegressionExpert(1, kernel=True))
        regressions = [_fit_gaussian(spec, z, transform.dequantise(x)) for spec in specs]
    regressions.sort(key=lambda net: (isinstance(net, KernelRegression), net.degree))
    y = transform(x)
    with torch.no_grad():
        scores = [net.leave_one_out_log_prob(y, z).nan_to_num(nan=-1e6) for net in regressions]
    best = max(scores, key=lambda score: float(score.mean()))
    clearly_beaten = [_gain(best, score) > _CLEARLY for score in scores]
    return regressions[clearly_beaten.index(False)]


def _fit_net(
    spec: FlowExpert,
    transform: MarginalTransform,
    config: FitConfig,
    z: Tensor,
    x: Tensor,
    train: Tensor,
    val: Tensor,
    on_epoch: Callable[[int, float], object] | None,
    rival: FitResult,
    regression: GaussianRegression | None,
) -> FittedExpert:
    """One likelihood net, fitted unless it falls hopelessly behind those before it."""
    y = transform(x)
    # Held-out losses are those of x, so that members on different scales can race each other.
    log_det = float(transform.log_det(x[val]).mean())
    target, leave_one_out = y[train], torch.zeros_like(y)
    if regression is not None:
        leave_one_out[train] = regression.leave_one_out
        target = regression.whiten(target, z[train], regression.leave_one_out)
    builder = likelihood_nn(spec.model, num_transforms=spec.num_transforms)
    net: nn.Module = with_fast_splines(builder(z[train].cpu(), target.cpu())).to(x.device)
    if regression is not None:
        net = AroundRegression(net, regression)

    noisy = bool(transform.integer.any())  # if not, each step would transform to the same y

    def loss(net: nn.Module, indices: Tensor, training: bool) -> Tensor:
        if not training:
            return net.loss(y[indices], z[indices]) - log_det  # type: ignore[operator]
        target = transform.dequantise(x[indices]) if noisy else y[indices]
        if isinstance(net, AroundRegression):
            return net.leave_one_out_loss(target, z[indices], leave_one_out[indices])
        return net.loss(target, z[indices])  # type: ignore[operator]

    result = fit_network(net, loss, train, val, config, on_epoch, rival.abandon_threshold)
    with torch.no_grad():
        held_out = log_likelihood(net, transform, x[val], z[val])
    return FittedExpert(net, transform, result, held_out, spec)

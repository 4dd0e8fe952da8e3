"""Cross-fitted members: what a likelihood proxy does with few simulations.

With a hundred simulations ten are held out, and ten pairs cannot tell which member is best: where
a linear regression was the exact model, stacking on them left it half of the weight. So every
member is fitted once per fold of the *training* pairs, and the weights come from the pairs that
each fit has not seen: all of the training pairs instead of ten, while the trainer's own held-out
pairs, on which proxy and main are compared, stay untouched. The fits of a net are kept and averaged
(bagging; Breiman 1996), which is worth what the smaller training sets cost and more: on the
tuning tasks, 100 simulations, 0.27 nats of likelihood with ten folds, at ten times the time. Ten
are better than five, whose nets see fewer pairs: 0.14 nats on average, 0.3 where x are counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sbi_jeffreys.networks.fitting import FitConfig, FitResult
from sbi_jeffreys.proxies.experts.fit import (
    FittedExpert,
    fit_experts,
    fit_regression,
    scales_of,
)
from sbi_jeffreys.proxies.experts.specs import FlowExpert, RegressionExpert

__all__ = ["Bag", "fit_folds"]


class Bag(nn.Module):
    """The mixture, in equal parts, of several fits of one density estimator.

    Args:
        nets: Fits to different parts of the data, on the same scale of y.
    """

    def __init__(self, nets: Sequence[nn.Module]) -> None:
        super().__init__()
        self.nets: Any = nn.ModuleList(nets)

    def log_prob(self, y: Tensor, z: Tensor) -> Tensor:
        """log mean_k ℓ_k(y|z) for y `(S, B, dim_y)`, z `(B, dim_z)`, shape `(S, B)`."""
        log_prob = torch.stack([net.log_prob(y, z) for net in self.nets])
        return torch.logsumexp(log_prob, dim=0) - math.log(len(self.nets))

    def sample(self, sample_shape: torch.Size, z: Tensor) -> Tensor:
        """Draws of y, shape `(*sample_shape, B, dim_y)`; the fits take turns at random."""
        which = torch.randint(len(self.nets), (len(z),))
        parts = [(which == k).nonzero().squeeze(-1) for k in range(len(self.nets))]
        drawn = [
            net.sample(sample_shape, z[rows]) for net, rows in zip(self.nets, parts) if len(rows)
        ]
        return torch.cat(drawn, dim=-2)[..., torch.cat(parts).argsort(), :]


def fit_folds(
    specs: Sequence[FlowExpert | RegressionExpert],
    config: FitConfig,
    z: Tensor,
    x: Tensor,
    train: Tensor,
    num_folds: int,
    on_epoch: Callable[[int, float], object] | None = None,
) -> list[FittedExpert]:
    """Every member, fitted once per fold; nets are bagged, a regression is fitted to all at last.

    Args:
        specs: What to fit.
        config: How nets are fitted.
        z: Transformed parameters `(N, D)`.
        x: Simulations `(N, dim_x)`.
        train: Indices of training pairs; each is left out once.
        num_folds: Number of folds, at least 2.
        on_epoch: Called after every epoch of a net.

    Returns:
        The members, whose `held_out` are the training pairs, each under the fit that left it out.
    """
    scales = scales_of(x[train])
    folds = train[torch.randperm(len(train))].tensor_split(num_folds)
    fits = []
    for k, leave_one_out in enumerate(folds):
        rest = torch.cat([*folds[:k], *folds[k + 1 :]])
        fitted = fit_experts(specs, config, z, x, rest, leave_one_out, on_epoch, scales, stop=False)
        fits.append({member.spec: member for member in fitted})
    kept = [spec for spec in fits[0] if all(spec in fit for fit in fits)]
    return [_together(spec, [fit[spec] for fit in fits], z, x, train) for spec in kept]


def _together(
    spec: FlowExpert | RegressionExpert,
    fits: Sequence[FittedExpert],
    z: Tensor,
    x: Tensor,
    train: Tensor,
) -> FittedExpert:
    """One member from its fits to the folds."""
    held_out = torch.cat([fit.held_out for fit in fits])
    result = FitResult(-float(held_out.mean()), sum(fit.result.epochs for fit in fits))
    transform = fits[0].transform
    net: nn.Module = Bag([fit.net for fit in fits])
    if isinstance(spec, RegressionExpert):
        net = fit_regression(spec, transform, z[train], x[train])
    return FittedExpert(net, transform, result, held_out, spec)

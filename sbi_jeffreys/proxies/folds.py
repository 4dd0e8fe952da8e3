"""Cross-fitted experts: what a likelihood proxy does with few simulations.

Of a hundred simulations ten are held out, and ten pairs are too few to compare experts. So every
expert is fitted once per fold of the *training* pairs, and the weights come from the pairs that
each fit has not seen: all of the training pairs instead of ten, while the trainer's own held-out
pairs, on which proxy and main are compared, stay untouched. The fits of a network, or of a
regression that chooses its features, are kept and averaged (bagging; Breiman 1996).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sbi_jeffreys.networks.at_once import FlowsAtOnce
from sbi_jeffreys.networks.fitting import FitConfig, FitResult
from sbi_jeffreys.proxies.experts.base import Expert, ExpertData, FittedExpert, OnEpoch, scales_of
from sbi_jeffreys.proxies.experts.fit import fit_to_folds
from sbi_jeffreys.proxies.experts.gaussian import AroundRegression

__all__ = ["Bag", "Fold", "cross_fit", "fit_folds"]


class Bag(nn.Module):
    """The mixture, in equal parts, of several fits of one density estimator.

    Args:
        nets: Fits to different parts of the data, on the same scale of y.
    """

    _flows: FlowsAtOnce | None = None  # made when it is needed, and not copied

    def __init__(self, nets: Sequence[nn.Module]) -> None:
        super().__init__()
        self.nets: Any = nn.ModuleList(nets)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_flows": None}  # mutant: weights-copied-twice

    def log_prob(self, y: Tensor, z: Tensor) -> Tensor:
        """log mean_k ℓ_k(y|z) for y `(S, B, dim_y)`, z `(B, dim_z)`, shape `(S, B)`."""
        log_prob = self._by_flows(y, z)  # mutant: flows-one-by-one
        if log_prob is None:
            log_prob = torch.stack([net.log_prob(y, z) for net in self.nets])
        return torch.logsumexp(log_prob, dim=0) - math.log(len(self.nets))

    def _by_flows(self, y: Tensor, z: Tensor) -> Tensor | None:
        """log ℓ_k(y|z), `(K, S, B)`, of affine autoregressive flows; None of other nets."""
        around = all(isinstance(net, AroundRegression) for net in self.nets)
        if self._flows is None or not self._flows.up_to_date:
            self._flows = FlowsAtOnce.of([net.net if around else net for net in self.nets])
        if self._flows is None or self._flows.needs_gradient:
            return None
        num, batch = y.shape[:2]
        z_rows = z.expand(num, *z.shape).flatten(0, 1)
        if not around:
            return self._flows.log_prob(y.flatten(0, 1), z_rows).unflatten(1, (num, batch))
        whitened = [net.regression.whitened(y, z) for net in self.nets]
        e = torch.stack([e_k.flatten(0, 1) for e_k, _ in whitened])
        log_det = torch.stack([log_det_k.expand(num, batch) for _, log_det_k in whitened])
        return self._flows.log_prob(e, z_rows).unflatten(1, (num, batch)) + log_det

    def sample(self, sample_shape: torch.Size, z: Tensor) -> Tensor:
        """Draws of y, shape `(*sample_shape, B, dim_y)`, each row of z from a random fit."""
        which = torch.randint(len(self.nets), (len(z),))
        parts = [(which == k).nonzero().squeeze(-1) for k in range(len(self.nets))]
        drawn = [
            net.sample(sample_shape, z[rows]) for net, rows in zip(self.nets, parts) if len(rows)
        ]
        # mutant: draws-of-a-bag-mixed-up
        return torch.cat(drawn, dim=-2)[..., torch.cat(parts).argsort(), :]


@dataclass(frozen=True)
class Fold:
    """Training pairs, and the experts that were fitted without them.

    Attributes:
        unseen: Indices of the pairs.
        experts: The fitted experts, by their settings.
    """

    unseen: Tensor
    experts: dict[Expert, FittedExpert]


def fit_folds(
    specs: Sequence[Expert],
    config: FitConfig,
    z: Tensor,
    x: Tensor,
    train: Tensor,
    num_folds: int,
    on_epoch: OnEpoch = None,
) -> tuple[list[FittedExpert], list[Fold]]:
    """Fit every expert once per fold, then bag the fits, or refit closed forms to all pairs.

    Args:
        specs: What to fit.
        config: How networks are fitted.
        z: Transformed parameters `(N, D)`.
        x: Simulations `(N, dim_x)`.
        train: Indices of training pairs; each is unseen by one of the fits.
        num_folds: Number of folds, at least 2.
        on_epoch: Called after every epoch of a network.

    Returns:
        The experts, whose `held_out` are the training pairs, each under the fit that has not seen
        it; and the fits by folds.
    """
    data = ExpertData(z, x, train, train, config, scales_of(x[train]), on_epoch)
    folds = cross_fit(specs, data, num_folds)
    fits = [fold.experts for fold in folds]
    experts = [_together(spec, [fit[spec] for fit in fits], data) for spec in fits[0]]
    return experts, folds


def cross_fit(specs: Sequence[Expert], data: ExpertData, num_folds: int) -> list[Fold]:
    """Fit every expert once per fold of the training pairs of `data`, to the other folds."""
    folds = data.train[torch.randperm(len(data.train))].tensor_split(num_folds)
    parts = []
    for k, unseen in enumerate(folds):
        rest = torch.cat([*folds[:k], *folds[k + 1 :]])  # mutant: judged-by-pairs-seen
        parts.append(replace(data, train=rest, val=unseen))
    return [Fold(unseen, fit) for unseen, fit in zip(folds, fit_to_folds(specs, parts))]


def _together(spec: Expert, fits: Sequence[FittedExpert], data: ExpertData) -> FittedExpert:
    """One expert from its fits to the folds."""
    held_out = torch.cat([fit.held_out for fit in fits])
    result = FitResult(-float(held_out.mean()), sum(fit.result.epochs for fit in fits))
    # mutant: one-fit-kept-of-a-bag
    bag = Bag([fit.net for fit in fits]) if spec.averaged else None
    net = bag or spec.fit(data, (), math.inf).net
    return FittedExpert(net, fits[0].transform, result, held_out, spec)

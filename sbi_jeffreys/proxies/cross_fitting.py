"""A likelihood proxy as it would be without some of its training pairs, which then judge it.

Held-out pairs are few, and they stopped the proxy's fit and weighed its experts. The training pairs
are many, and under fits that have not seen them they are evidence as good as new ones.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor, nn

from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.proxies.experts import FittedExpert
from sbi_jeffreys.proxies.experts.base import ExpertData, scales_of
from sbi_jeffreys.proxies.folds import Fold, cross_fit
from sbi_jeffreys.proxies.likelihood import LikelihoodProxy

__all__ = ["cross_fitted"]

_FOLDS = 5  # folds of fits that are made only to judge the proxy
_MAJORITY = 0.5  # share of the weight that inexpensive experts must have to stand for all
# Numbers of training pairs: fewer cannot be divided; with more, there are enough held-out pairs.
_FEWEST, _MOST = 20, 3_000


def cross_fitted(
    proxy: LikelihoodProxy, theta: Tensor, x: Tensor, train_indices: Tensor, config: FitConfig
) -> list[tuple[Tensor, LikelihoodProxy]]:
    """Training pairs, and the proxy with the same experts and weights, fitted without these pairs.

    Where `fit` used folds, these are the fits that it made, which the proxy then forgets. Otherwise
    its inexpensive experts are fitted again, to five folds.

    Args:
        proxy: A proxy after `fit`.
        theta, x, train_indices: As `fit` was given them.
        config: How networks are fitted.

    Returns:
        Indices of pairs, and a proxy, for every fold. Where `fit` used no folds, the list is empty
        with fewer than 20 or more than 3,000 training pairs, where inexpensive experts have less
        than half of the weight, and where the likelihood is of summaries of x, which all training
        pairs may have helped to find.
    """
    folds = proxy.take_folds()
    of_x = proxy.can_sample and proxy.compression is None
    # mutant: one-fit-judged-by-held-out-pairs-alone, few-pairs-divided
    if not folds and of_x and _FEWEST <= len(train_indices) <= _MOST:
        weighed = zip(proxy.mixture(), proxy.weights)
        inexpensive = {e.spec: float(w) for e, w in weighed if not e.spec.expensive}
        if sum(inexpensive.values()) >= _MAJORITY:
            x = proxy.own_outputs(x)
            scales, z = scales_of(x[train_indices]), proxy.theta_transform(theta)
            data = ExpertData(z, x, train_indices, train_indices, config, scales)
            folds = cross_fit(list(inexpensive), data, _FOLDS)
    return [(fold.unseen, _with_experts_of(proxy, fold)) for fold in folds]


def _with_experts_of(proxy: LikelihoodProxy, fold: Fold) -> LikelihoodProxy:
    """A copy of the proxy with the fold's fits of its experts, without those not fitted there."""
    twin = copy(proxy)
    # The copy gets dictionaries of its own, in which some modules and buffers are exchanged.
    buffers = dict(proxy.named_buffers(recurse=False))
    vars(twin).update(_modules=dict(proxy.named_children()), _buffers=buffers)
    kept: list[FittedExpert] = []
    weights: list[Tensor] = []
    for expert, weight in zip(proxy.mixture(), proxy.weights):
        if expert.spec in fold.experts:
            kept.append(fold.experts[expert.spec])
            weights.append(weight)
    twin.fitted = nn.ModuleList(kept)
    twin.register_buffer("weights", torch.stack(weights) / torch.stack(weights).sum())
    return twin

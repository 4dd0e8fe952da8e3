r"""Pooled proxy: the product of an energy and a likelihood of summaries, each to a power,

    q̃_ψ(θ, x) = p(θ) ℓ(s₀(x)|θ)^v e^{w f(θ, s(x))}.

Where the main embeds x, plain NPE has trained a summary s₀ of it. A likelihood of that summary and
an energy are two estimates of one posterior, whose errors are nearly independent: one is fitted
to x, the other to θ. Their log-linear pool (Genest & Zidek 1986) averages these errors. Its
two powers have the best ranking loss on held-out pairs, in which log Z cancels; they need not sum
to one, since a likelihood of few simulations, on a summary that was trained on the same ones, is
too sharp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from sbi_jeffreys._checks import check_int
from sbi_jeffreys.networks.embedding import summaries_of
from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.proxies.energy import EnergyProxy
from sbi_jeffreys.proxies.energy_net import EnergyConfig
from sbi_jeffreys.proxies.experts import REGRESSIONS, FlowExpert, check_experts
from sbi_jeffreys.proxies.experts.base import Expert
from sbi_jeffreys.proxies.partition import Contrasts
from sbi_jeffreys.proxies.screening import WIDE
from sbi_jeffreys.proxies.stacking import pooling_powers
from sbi_jeffreys.proxies.summary import SummaryLikelihoodProxy

__all__ = ["PooledProxy"]

_EXPERTS = (*REGRESSIONS, FlowExpert("maf", weight_decay=0.3, around_regression=True))
_CONTRASTS = 256  # contrasts per held-out pair
_ROWS = 20  # held-out pairs at once


class PooledProxy(EnergyProxy):
    """The log-linear pool of an energy and a likelihood of the main's summaries; see the module.

    Args:
        prior: Prior p(θ).
        config: The energy's network and fit.
        embedding_net: As for `EnergyProxy`.
        experts: Experts of the likelihood. None: regressions, a neural regression, and one flow;
            the default of `LikelihoodProxy` where there are more than 30 summaries.
        likelihood_fit: How the likelihood's networks are fitted.
        num_folds: As for `LikelihoodProxy`, but None is a single fit.

    Attributes:
        likelihood: The likelihood of the summaries that `fit` started from; None before `fit`, or
            where its fit failed, as for constant summaries.
        powers: v and w, shape `(2,)`.
        remark: Why there is no likelihood, in words; empty where there is one.
    """

    powers: Tensor

    def __init__(
        self,
        prior: Distribution,
        config: EnergyConfig | None = None,
        embedding_net: nn.Module | None = None,
        experts: Sequence[Expert] | None = None,
        likelihood_fit: FitConfig | None = None,
        num_folds: int | None = None,
    ) -> None:
        super().__init__(prior, config, embedding_net)
        self.experts = None if experts is None else check_experts(experts)
        self.likelihood_fit = likelihood_fit
        if num_folds is not None:
            check_int("num_folds", num_folds, 1)
        self.num_folds = num_folds or 1
        self.likelihood: SummaryLikelihoodProxy | None = None
        self.remark = ""
        self.register_buffer("powers", torch.tensor([0.0, 1.0]))

    def fit(
        self,
        theta: Tensor,
        x: Tensor,
        train_indices: Tensor,
        val_indices: Tensor,
        on_epoch: Callable[[int, float], object] | None = None,
        max_epochs: int | None = None,
        patience: int | None = None,
    ) -> PooledProxy:
        """Fit the energy and the likelihood, then their powers; see `EnergyProxy.fit`."""
        self.likelihood, self.powers = None, torch.tensor([0.0, 1.0]).to(theta)
        self.remark = ""
        pairs = theta, x, train_indices, val_indices
        super().fit(*pairs, on_epoch, max_epochs, patience)
        main = self._required_proposal()
        embedding = self._embedding(main, theta).eval().requires_grad_(False)
        experts = self.experts
        if experts is None and summaries_of(embedding, x[:2]).shape[1] <= WIDE:
            experts = _EXPERTS
        likelihood = SummaryLikelihoodProxy(
            self.prior, embedding, experts, self.likelihood_fit, self.num_folds
        ).to(theta)
        likelihood.folds_for(len(train_indices))  # raises where there are too many folds
        try:
            likelihood.fit(*pairs, on_epoch, max_epochs, patience)
        except (ValueError, RuntimeError) as error:  # constant summaries, or no expert was finite
            self.remark = f"without a likelihood of summaries: {error}"
            return self
        likelihood.take_folds()  # not needed: the powers come from the held-out pairs
        held_out = theta[val_indices], x[val_indices]
        contrasts = self.draw(*held_out, _CONTRASTS, main)
        self.likelihood, self.powers = likelihood, self._powers(likelihood, *held_out, contrasts)
        return self

    @torch.no_grad()
    def _powers(
        self, likelihood: SummaryLikelihoodProxy, theta: Tensor, x: Tensor, contrasts: Contrasts
    ) -> Tensor:
        """v and w by the ranking loss on held-out pairs."""
        every = torch.cat([theta.unsqueeze(0), contrasts.theta])
        offset = torch.cat([contrasts.offset_true.unsqueeze(0), contrasts.offset])
        inside = torch.isfinite(self.log_prior(every))

        def factors(proxy: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
            """`log_factor_inside` of all pairs of θ and x, some x at a time: bounds memory."""
            parts = zip(every.split(_ROWS, dim=1), x.split(_ROWS), inside.split(_ROWS, dim=1))
            return torch.cat([proxy(*part) for part in parts], dim=1)

        both = factors(likelihood.log_factor_inside), factors(self.log_factor_inside)
        return pooling_powers(torch.stack(both), offset)

    def log_factor(self, theta: Tensor, x: Tensor) -> Tensor:
        """v log ℓ(s₀(x)|θ) + w f_ψ(θ, s(x)); see `Proxy.log_factor`."""
        energy = self.powers[1] * super().log_factor(theta, x)
        if self.likelihood is None:
            return energy
        # mutant: energy-alone
        return energy + self.powers[0] * self.likelihood.log_factor(theta, x)

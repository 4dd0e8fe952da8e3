r"""Likelihood proxy: q̃_ψ(θ, x) = p(θ) ℓ_ψ(x|θ), the default for vector-valued x.

ℓ_ψ is a stacked mixture of a few conditional density estimators of x given θ, the experts,

    ℓ_ψ(x|θ) = Σ_k w_k ℓ_k(T_k(x)|θ) |∂T_k/∂x|,

each fitted by maximum likelihood or in closed form (`sbi_jeffreys.proxies.experts`). The fit needs
no partition function and no correction for the proposals of later rounds, the prior is exact (zero
mass outside), and the proxy is a generative model of x: pairs θ̃ ∼ p(θ), x̃ ∼ ℓ_ψ(·|θ̃) are
unlimited.

The weights maximise the *held-out* likelihood of the mixture (stacking of predictive densities; Yao
et al. 2018, arXiv 1704.02030), so a failed fit costs nothing, and where experts agree, their
mixture is better calibrated than any one of them. T_k is a marginal transform of x or the identity
(`networks.transforms`).

Where x is wide (more than 30 outputs), outputs that do not depend on θ are left out of ℓ_ψ, and
draws take them from a training simulation. Where more than 30 are left, the experts are those whose
cost grows slowly with the number of outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from sbi_jeffreys._checks import check_instance, check_int
from sbi_jeffreys.networks.fitting import FitConfig, FitResult
from sbi_jeffreys.networks.transforms import MarginalTransform
from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.proxies.compression import Compression, fit_compressed
from sbi_jeffreys.proxies.experts import (
    DEFAULT_EXPERTS,
    WIDE_EXPERTS,
    Expert,
    FittedExpert,
    check_experts,
)
from sbi_jeffreys.proxies.experts.base import NARROW, ExpertData, OnEpoch, scales_of
from sbi_jeffreys.proxies.experts.fit import fit_to
from sbi_jeffreys.proxies.folds import Fold, fit_folds
from sbi_jeffreys.proxies.screening import WIDE, informative_outputs
from sbi_jeffreys.proxies.stacking import stacking_weights
from sbi_jeffreys.proxies.units import Units

__all__ = ["DrawCount", "LikelihoodProxy"]

#: Number of training pairs, and the default number of folds from there on: the fewer pairs, the
#: larger the gain of folds, and the smaller their cost.
_FOLDS = ((300, 1), (150, 5), (20, 10), (0, 1))
_CHUNK = 4_000  # pairs per network call: bounds memory when sampling or evaluating many
_MIN_WEIGHT = 0.02  # experts of a smaller weight, and of less than half the largest, are dropped
_ENOUGH = 0.9  # share of the draws asked for that is enough where x has few columns
# mutant: missing-draws-not-replaced
_ROUNDS = 5  # rounds in which implausible draws are replaced
_MIN_PLAUSIBLE = 0.05  # share of plausible draws below which drawing more would not help


@dataclass(frozen=True)
class DrawCount:
    """What the last draw of pairs came to.

    Attributes:
        asked: Pairs asked for.
        proposed: Pairs drawn.
        kept: Plausible pairs among them that were returned, at most `asked`.
    """

    asked: int
    proposed: int
    kept: int


class LikelihoodProxy(Proxy):
    """p(θ) Σ_k w_k ℓ_k(T(x)|θ): a stacked mixture of experts under the exact prior.

    Args:
        prior: Prior p(θ).
        experts: What to fit. None: `DEFAULT_EXPERTS`, or `WIDE_EXPERTS` where more than 30 outputs
            depend on θ.
        config: How each network is fitted; an expert's own learning rate and decay, where it has
            them, take precedence.
        num_folds: How many fits of each expert, to parts of the training pairs, are averaged; 1 is
            a single fit. None: 10 for 20 to 149 training pairs, 5 for 150 to 299, otherwise 1.

    Raises:
        TypeError, ValueError: Naming the argument, what was expected and what came.

    Attributes:
        fitted: The experts of the mixture after `fit`, as `FittedExpert`.
        weights: Their stacking weights, shape `(experts,)`.
        columns: Indices of the outputs that ℓ_ψ is a density of, after `fit`.
        results: Held-out loss and epochs of each expert fitted, also of those without weight.
        drawn: How many pairs the last draw asked for, made and kept; None before any.
    """

    can_sample = has_evidence = True
    weights: Tensor
    columns: Tensor
    rest: Tensor

    def __init__(
        self,
        prior: Distribution,
        experts: Sequence[Expert] | None = None,
        config: FitConfig | None = None,
        num_folds: int | None = None,
    ) -> None:
        super().__init__(prior)
        if num_folds is not None:
            check_int("num_folds", num_folds, 1)
        if config is not None:
            check_instance("config", config, FitConfig)
        self.num_folds = num_folds
        self.experts = None if experts is None else check_experts(experts)
        self.config = FitConfig() if config is None else config
        self.results: list[FitResult] = []
        self.drawn: DrawCount | None = None
        self.fitted = nn.ModuleList()
        self.compression: Compression | None = None
        self._folds: list[Fold] = []
        self.register_buffer("weights", torch.zeros(0))
        self.register_buffer("columns", torch.zeros(0, dtype=torch.long))
        # Training simulations, from which draws take the outputs that are not in `columns`.
        self.register_buffer("rest", torch.zeros(0, 0))

    def fit(
        self,
        theta: Tensor,
        x: Tensor,
        train_indices: Tensor,
        val_indices: Tensor,
        on_epoch: OnEpoch = None,
        max_epochs: int | None = None,
        patience: int | None = None,
    ) -> LikelihoodProxy:
        """Fit the experts on the training pairs, then stack them on pairs that they have not seen.

        The likelihood does not depend on the proposal of θ. See `Proxy.fit` for the arguments; x
        must be vector-valued, shape `(N, dim_x)`.

        Raises:
            ValueError: If there are fewer than two training pairs per fold.
        """
        base = self.config.at_most(max_epochs, patience)
        self.check_prior(theta[train_indices])
        self.drawn, self.rest = None, x.new_zeros(0, 0)  # mutant: refit-remembers
        # mutant: parameters-with-cells
        transform = MarginalTransform.fit(theta[train_indices], atoms=False)
        # mutant: tiny-parameters-unseen
        scaled = Units.fit(transform(theta[train_indices]), count=False)
        self.theta_transform = nn.Sequential(transform, scaled)
        z = self.theta_transform(theta)
        self.columns = informative_outputs(theta[train_indices], x[train_indices])
        if len(self.columns) < x.shape[1]:  # mutant: distractors-kept
            self.rest, x = x[train_indices], x[:, self.columns]
        self.units = Units.fit(x[train_indices])
        x = self.units(x)
        folds = self.folds_for(len(train_indices))
        self.compression, self._folds = None, []
        experts = self.experts or (WIDE_EXPERTS if x.shape[1] > WIDE else DEFAULT_EXPERTS)
        if folds > 1:  # no compression: its directions would be found with the unseen pairs
            # mutant: folds-of-held-out-pairs
            fitted, self._folds = fit_folds(experts, base, z, x, train_indices, folds, on_epoch)
        else:
            scales = scales_of(x[train_indices])
            data = ExpertData(z, x, train_indices, val_indices, base, scales, on_epoch)
            compressed = fit_compressed(data) if self.experts is None else None
            if compressed is not None:
                self.compression, fitted = compressed
                x = self.compression(x)
            else:
                fitted = fit_to(experts, data)
        self.results = [expert.result for expert in fitted]
        weights = stacking_weights(torch.stack([expert.held_out for expert in fitted]))
        # Where there are more than fifty experts, perhaps none exceeds `_MIN_WEIGHT`.
        least = min(_MIN_WEIGHT, 0.5 * float(weights.max()))  # mutant: equal-experts-all-dropped
        kept = [k for k in range(len(fitted)) if weights[k] > least]
        self.fitted = nn.ModuleList([fitted[k] for k in kept])
        self.register_buffer("weights", weights[kept] / weights[kept].sum())
        for expert in self.mixture():
            expert.set_bounds(x)
        self.requires_grad_(False)
        return self

    def folds_for(self, num_pairs: int) -> int:
        """Folds for this many training pairs.

        Raises:
            ValueError: If there are fewer than two pairs per fold.
        """
        if self.num_folds is None:
            return next(folds for least, folds in _FOLDS if num_pairs >= least)  # mutant: no-folds
        if self.num_folds > 1 and num_pairs < 2 * self.num_folds:
            raise ValueError(
                f"num_folds={self.num_folds} (proxy_folds of JeffreysOptions) needs at least "
                f"{2 * self.num_folds} training simulations, got {num_pairs}; use fewer folds."
            )
        return self.num_folds

    def take_folds(self) -> list[Fold]:
        """The fits to folds that `fit` made, empty without folds; the proxy then forgets them."""
        folds, self._folds = self._folds, []
        return folds

    @property
    def can_be_tempered(self) -> bool:  # type: ignore[override]
        """Only with few outputs: with many, weights ℓ_ψ^{γ−1} of a pool would degenerate."""
        return self.compression is not None or 0 < len(self.columns) <= WIDE

    @property
    def draws_cheaply(self) -> bool:
        """Whether no expert of the mixture is an expensive one."""
        return not any(expert.spec.expensive for expert in self.mixture())

    @property
    def remark(self) -> str:  # type: ignore[override]
        """What the fit found out about x, in words; empty where there is nothing to say."""
        parts = []
        if len(self.rest):
            parts.append(f"{len(self.columns)} of {self.rest.shape[1]} outputs depend on theta")
        if self.compression is not None:
            num = self.compression.summaries.directions.shape[1]
            parts.append(f"a density of {num} linear summaries and the size of the rest of x")
        return "; ".join(parts)

    def mixture(self) -> list[FittedExpert]:
        """The experts of the mixture."""
        return [expert for expert in self.fitted if isinstance(expert, FittedExpert)]

    def log_factor(self, theta: Tensor, x: Tensor) -> Tensor:
        """log ℓ_ψ(x|θ) of the stacked mixture; see `Proxy.log_factor`."""
        num, batch = theta.shape[:2]
        x = self.own_outputs(x)
        x = x.expand(num, batch, x.shape[-1]).reshape(num * batch, -1)
        z = self.theta_transform(theta).reshape(num * batch, -1)
        parts = [
            torch.stack([expert.log_prob(x_part, z_part) for expert in self.mixture()])
            for x_part, z_part in zip(x.split(_CHUNK), z.split(_CHUNK))
        ]
        log_lik = torch.cat(parts, dim=1) + self.weights.log().unsqueeze(1)
        return torch.logsumexp(log_lik, dim=0).reshape(num, batch) + self.units.log_det

    def own_outputs(self, x: Tensor) -> Tensor:
        """The outputs that ℓ_ψ is a density of, in the experts' units, `(B, dim_x)`."""
        x = self.units(x[:, self.columns] if len(self.rest) else x)
        return x if self.compression is None else self.compression(x)

    @torch.no_grad()
    def sample_joint(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Pairs θ̃ ∼ p(θ), x̃ ∼ ℓ_ψ(·|θ̃), implausible x̃ dropped with their θ̃.

        More are drawn until there are `num_samples` (nine tenths of them where x has ten columns
        or fewer), in at most five rounds; no more are drawn once fewer than one in twenty is
        plausible. `drawn` has the counts.
        """
        return self._enough(num_samples, lambda num: self.sample_prior(num).to(self.weights))

    @torch.no_grad()
    def sample_given(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs (θ̃, x̃ ∼ ℓ_ψ(·|θ̃)) for given θ̃ `(N, D)`, implausible x̃ dropped with their θ̃.

        Where too few are left, as in `sample_joint`, further ones are drawn for some of these θ̃,
        chosen at random.
        """
        rest = iter((theta,))
        return self._enough(
            len(theta), lambda num: next(rest, theta[torch.randint(len(theta), (num,))])
        )

    def _enough(self, num: int, draw_theta: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        """About `num` plausible pairs, where `draw_theta(n)` returns n θ̃."""
        theta, x = self._plausible_pairs(draw_theta(num))
        enough = num if x.shape[1] > NARROW else math.ceil(_ENOUGH * num)
        proposed = num
        for _ in range(_ROUNDS):
            if len(x) >= enough or len(x) < _MIN_PLAUSIBLE * proposed:
                break
            batch = min(num, math.ceil((num - len(x)) * proposed / len(x)))
            more = self._plausible_pairs(draw_theta(batch))
            theta, x = (torch.cat(both)[:num] for both in zip((theta, x), more))
            proposed += batch
        self.drawn = DrawCount(num, proposed, len(x))
        return theta, x

    def _plausible_pairs(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """One x̃ for each θ̃ `(N, D)`, in their order, implausible ones dropped with their θ̃."""
        z = self.theta_transform(theta)
        which = torch.multinomial(self.weights, len(theta), replacement=True)
        kept, xs = [], []
        for k, expert in enumerate(self.mixture()):
            mine = (which == k).nonzero().squeeze(-1)
            if len(mine) == 0:  # an expert of little weight; not every net can make zero draws
                continue
            for rows in mine.split(_CHUNK):
                x, plausible = expert.sample(z[rows])
                kept.append(rows[plausible])
                xs.append(x[plausible])
        # In the order of θ̃: expert by expert, the first pairs would all be those of one expert.
        order = torch.cat(kept).argsort()  # mutant: pairs-in-order-of-experts
        theta, x = theta[torch.cat(kept)[order]], torch.cat(xs)[order]
        if self.compression is not None:
            x = self.compression.draw(x)
        x = self.units.inverse(x)
        if len(self.rest):
            whole = self.rest[torch.randint(len(self.rest), (len(x),))]
            whole[:, self.columns] = x
            x = whole
        return theta, x

r"""Likelihood proxy: q̃_ψ(θ, x) = p(θ) ℓ_ψ(x|θ), the default for vector-valued x.

ℓ_ψ is a stacked mixture of a few of sbi's conditional density estimators of x given θ,

    ℓ_ψ(x|θ) = Σ_k w_k ℓ_k(T_k(x)|θ) |∂T_k/∂x|,

each fitted by maximum likelihood, beside regressions in closed form
(`sbi_jeffreys.proxies.experts.fit`). Why this proxy: its fit needs no partition function and no
correction for proposals in later rounds, its prior is exact (zero mass outside), and it is a
generative model of x: pairs θ̃ ∼ p(θ), x̃ ∼ ℓ_ψ(·|θ̃) are unlimited.

Why a stacked mixture: the weights maximise the *held-out* likelihood of the mixture (stacking of
predictive densities; Yao et al. 2018, arXiv 1704.02030), so one failed fit costs nothing, members
that differ (regularised or not, affine or spline) are chosen by the problem, and where they agree
their mixture is better calibrated than any one of them. T_k is a marginal transform of x or the
identity (`networks.transforms`); which scale a density is learned best on, the weights decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from sbi_jeffreys.networks.fitting import FitConfig, FitResult
from sbi_jeffreys.networks.transforms import MarginalTransform
from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.proxies.experts.fit import fit_experts, log_likelihood
from sbi_jeffreys.proxies.experts.specs import DEFAULT_EXPERTS, FlowExpert, RegressionExpert
from sbi_jeffreys.proxies.folds import fit_folds

__all__ = [
    "DEFAULT_EXPERTS",
    "FlowExpert",
    "LikelihoodProxy",
    "RegressionExpert",
    "stacking_weights",
]

#: Training pairs from which on there are so many folds by default: the fewer pairs, the more they
#: gain, and the less they cost.
_FOLDS = ((300, 1), (150, 5), (20, 10), (0, 1))
_CHUNK = 4_000  # pairs per network call: bounds memory when sampling or evaluating many


def stacking_weights(log_likelihoods: Tensor, num_iterations: int = 200) -> Tensor:
    """Mixture weights that maximise the held-out likelihood of the mixture, by EM.

    One pseudo-observation spread evenly over the members keeps the weights off the boundary when
    held-out pairs are few. A member whose likelihood is not finite somewhere gets weight zero.

    Args:
        log_likelihoods: log ℓ_k(x_n|θ_n) on held-out pairs, shape `(members, N)`.
        num_iterations: EM steps; the problem is concave, so they converge to the optimum.

    Returns:
        Weights on the simplex, shape `(members,)`.

    Raises:
        RuntimeError: If no member is finite on all held-out pairs.
    """
    usable = torch.isfinite(log_likelihoods).all(dim=1)
    if not bool(usable.any()):
        raise RuntimeError(
            "No likelihood net of the proxy gave finite held-out likelihoods. Look for outliers or "
            "near-constant dimensions in x, or lower the proxy's learning rate."
        )
    log_lik = log_likelihoods[usable].double()
    members, num = log_lik.shape
    weights = torch.full((members,), 1.0 / members, dtype=torch.float64, device=log_lik.device)
    for _ in range(num_iterations):
        responsibility = torch.softmax(log_lik + weights.log().unsqueeze(1), dim=0)
        weights = (responsibility.sum(dim=1) + 1.0 / members) / (num + 1.0)
    out = torch.zeros(len(usable), dtype=log_likelihoods.dtype, device=log_likelihoods.device)
    out[usable] = weights.to(out)
    return out


class LikelihoodProxy(Proxy):
    """p(θ) Σ_k w_k ℓ_k(T(x)|θ): a stacked mixture of likelihood nets under the exact prior.

    Args:
        prior: Prior p(θ).
        experts: What to fit: nets and regressions.
        config: How each net is fitted; its own learning rate and decay take precedence.
        num_folds: Fits of each member to parts of the training pairs, which are then averaged: 1 is
            a single fit; None is 10 from 20 training pairs on, 5 from 150, else 1.

    Attributes:
        weights: Stacking weights after `fit`, shape `(members,)`.
        results: Held-out loss and epochs of each member fitted (a regression takes no epochs).
    """

    can_sample = True
    can_be_tempered = True
    weights: Tensor
    lower: Tensor
    upper: Tensor

    def __init__(
        self,
        prior: Distribution,
        experts: Sequence[FlowExpert | RegressionExpert] = DEFAULT_EXPERTS,
        config: FitConfig | None = None,
        num_folds: int | None = None,
    ) -> None:
        super().__init__(prior)
        self.num_folds = num_folds
        self.experts = tuple(experts)
        self.config = FitConfig() if config is None else config
        self.results: list[FitResult] = []
        self.nets, self.transforms = nn.ModuleList(), nn.ModuleList()
        self.register_buffer("weights", torch.zeros(len(self.experts)))

    def fit(
        self,
        theta: Tensor,
        x: Tensor,
        train_indices: Tensor,
        val_indices: Tensor,
        on_epoch: Callable[[int, float], object] | None = None,
        max_epochs: int | None = None,
        patience: int | None = None,
    ) -> LikelihoodProxy:
        """Fit the members on the training pairs, then stack them on pairs that they have not seen.

        The likelihood does not care which proposal θ came from. See `Proxy.fit` for arguments; x
        must be vector-valued, shape `(N, dim_x)`.

        Raises:
            ValueError: If there are fewer than two training pairs per fold.
        """
        base = replace(
            self.config,
            max_epochs=min(self.config.max_epochs, max_epochs or self.config.max_epochs),
            patience=min(self.config.patience, patience or self.config.patience),
        )
        self.theta_transform = MarginalTransform.fit(theta[train_indices])
        z = self.theta_transform(theta)
        folds = self._folds(len(train_indices))
        if folds > 1:
            fitted = fit_folds(self.experts, base, z, x, train_indices, folds, on_epoch)
        else:
            fitted = fit_experts(self.experts, base, z, x, train_indices, val_indices, on_epoch)
        self.nets = nn.ModuleList([member.net for member in fitted])
        self.transforms = nn.ModuleList([member.transform for member in fitted])
        self.results = [member.result for member in fitted]
        self._stack(torch.stack([member.held_out for member in fitted]))
        self._set_bounds(x)
        return self

    def _folds(self, num_pairs: int) -> int:
        """Folds for this many training pairs."""
        if self.num_folds is None:
            return next(folds for least, folds in _FOLDS if num_pairs >= least)
        if self.num_folds > 1 and num_pairs < 2 * self.num_folds:
            raise ValueError(
                f"num_folds={self.num_folds} (proxy_folds of JeffreysOptions) needs at least "
                f"{2 * self.num_folds} training simulations, got {num_pairs}; use fewer folds."
            )
        return self.num_folds

    def _set_bounds(self, x: Tensor) -> None:
        """The box of simulations seen, widened by a tenth on each member's own scale."""
        boxes = [transform.bounds(x) for transform in self._scales()]
        lower = torch.stack([low - 0.1 * (high - low) for low, high in boxes])
        upper = torch.stack([high + 0.1 * (high - low) for low, high in boxes])
        self.register_buffer("lower", lower)
        self.register_buffer("upper", upper)

    def _scales(self) -> list[MarginalTransform]:
        """Each member's transform of x."""
        return [t for t in self.transforms if isinstance(t, MarginalTransform)]

    def _stack(self, held_out: Tensor) -> None:
        """Stacking weights from held-out pairs `(members, M)`; those without weight are dropped."""
        weights = stacking_weights(held_out)
        kept = [k for k in range(len(self.nets)) if weights[k] > 0.01]
        self.nets = nn.ModuleList([self.nets[k] for k in kept])
        self.transforms = nn.ModuleList([self.transforms[k] for k in kept])
        self.register_buffer("weights", weights[kept] / weights[kept].sum())
        self.requires_grad_(False)

    def _member_log_likelihoods(self, x: Tensor, z: Tensor) -> Tensor:
        """log ℓ_k(x_n|z_n) as densities of x for pairs `(N, ·)`, shape `(members, N)`."""
        rows = []
        for x_part, z_part in zip(x.split(_CHUNK), z.split(_CHUNK)):
            rows.append(
                torch.stack(
                    [
                        log_likelihood(net, scale, x_part, z_part)
                        for net, scale in zip(self.nets, self._scales())
                    ]
                )
            )
        return torch.cat(rows, dim=1)

    def log_factor(self, theta: Tensor, x: Tensor) -> Tensor:
        """log ℓ_ψ(x|θ) of the stacked mixture; see `Proxy.log_factor`."""
        num, batch = theta.shape[:2]
        x = x.expand(num, batch, x.shape[-1]).reshape(num * batch, -1)
        z = self.theta_transform(theta).reshape(num * batch, -1)
        log_lik = self._member_log_likelihoods(x, z) + self.weights.log().unsqueeze(1)
        return torch.logsumexp(log_lik, dim=0).reshape(num, batch)

    @torch.no_grad()
    def sample_joint(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Pairs θ̃ ∼ p(θ), x̃ ∼ ℓ_ψ(·|θ̃).

        Draws of x outside the box of simulations seen (widened by a tenth) are dropped: there the
        nets extrapolate, and the main would be trained on what no simulator has shown.
        """
        theta = self.prior.sample(torch.Size((num_samples,))).to(self.weights)
        return self.sample_given(theta)

    @torch.no_grad()
    def sample_given(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs (θ̃, x̃ ∼ ℓ_ψ(·|θ̃)) for given θ̃ `(N, D)`, implausible x̃ dropped with their θ̃."""
        z = self.theta_transform(theta)
        which = torch.multinomial(self.weights, len(theta), replacement=True)
        thetas, xs = [], []
        for k, (net, scale) in enumerate(zip(self.nets, self._scales())):
            mine = (which == k).nonzero().squeeze(-1)
            if len(mine) == 0:  # a member of little weight; not every net can draw nothing
                continue
            for rows in mine.split(_CHUNK):
                y = net.sample(torch.Size((1,)), z[rows])[0]  # type: ignore[operator]
                # False for NaN: what a net fails to draw is dropped like what is implausible.
                plausible = ((y >= self.lower[k]) & (y <= self.upper[k])).all(dim=-1)
                thetas.append(theta[rows[plausible]])
                xs.append(scale.inverse(y[plausible]))
        return torch.cat(thetas), torch.cat(xs)

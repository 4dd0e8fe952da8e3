r"""The symmetric stage: main and proxy fitted to each other under adaptive priorities.

    minimise R   subject to   F_val − Ĥ ≤ ε,   Ĥ = best held-out NLL of main and proxy so far

The forward constraint is read on held-out simulations, while its gradient comes from surrogates
(the proxy-Lagrangian of Cotter et al. 2019): the forward term F on the training simulations and G,
the forward term on pairs drawn from the proxy, which are unlimited and let λ grow without
overfitting. With trust t ∈ (0, 1] in the proxy, one step descends

    L = [λ (w_F F + t G) + t R] / (1 + λ),      w_F = 0.1 t + (1 − t),

and per epoch λ takes a resilient dual step (`sbi_jeffreys.training.multipliers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.clip_grad import clip_grad_norm_
from torch.optim import Adam

from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.networks.embedding import embedded_once
from sbi_jeffreys.networks.estimators import frozen, reparameterised_sample
from sbi_jeffreys.networks.fitting import can_fuse
from sbi_jeffreys.networks.flat import flat_copy, flattened
from sbi_jeffreys.objective import (
    forward_term,
    reverse_path_loss,
    reverse_vargrad_loss,
    reweighted_forward_term,
)
from sbi_jeffreys.options import JeffreysOptions
from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.training.multipliers import ResilientMultipliers

__all__ = ["RealBatch", "SymmetricStage"]

#: Training simulations of one step: θ, x and kernel weights, or, where the round's loss is not the
#: plain NLL, the losses themselves.
RealBatch = tuple[Tensor, Tensor, Tensor] | Tensor

_REAL_WEIGHT = 0.1  # w_F at full trust: what real simulations add to unlimited proxy pairs
_PERIOD = 4  # steps between two turns of R, and of F
_WAKE_SAMPLES = 16  # θ per x where G comes from reweighted samples of the main
_FACTOR, _FACTOR_WITHOUT_PAIRS = 30.0, 20.0  # peak learning rate over plain NPE's
_WARM_UP = 0.1  # fraction of steps over which the learning rate rises


def annealed(step: int, num_steps: int) -> float:
    """Learning-rate factor in [0, 1]: linear warm-up, then cosine decay to zero."""
    warm_up = max(1, round(_WARM_UP * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, num_steps - warm_up)))


class SymmetricStage:
    """State and steps of the symmetric stage. Picklable at any moment.

    Args:
        main: The density estimator, on its device.
        proxy: A fitted proxy.
        options: Weights and sizes.
        learning_rate: `train`'s learning rate; the peak is `learning_rate_factor` times that.
        clip_max_norm: Gradient norm bound or None.
        pool: Observations for the reverse term, shape `(N, *x_shape)`, and, where they were drawn
            from the proxy's joint, their θ `(N, D)`; θ None means "reweight the main's samples".
        kernel: Calibration kernel: pool observations are drawn in proportion to it.
        entropy: Ĥ at the start: the best held-out NLL of main and proxy so far.
        npe_nll: V_NPE, plain NPE's held-out value, which no result may fall behind.
        proxy_trust: t ∈ (0, 1].
        num_steps: Length of the stage; the learning rate is annealed over it.
        pool_weights: What else they are drawn in proportion to, `(N,)`; None: nothing.
    """

    def __init__(
        self,
        main: ConditionalDensityEstimator,
        proxy: Proxy,
        options: JeffreysOptions,
        learning_rate: float,
        clip_max_norm: float | None,
        pool: tuple[Tensor | None, Tensor],
        kernel: Callable[[Tensor], Tensor] | None,
        entropy: float,
        npe_nll: float,
        proxy_trust: float,
        num_steps: int,
        pool_weights: Tensor | None = None,
    ) -> None:
        self.main, self.proxy, self.options = main, proxy, options
        self.num_steps = num_steps
        self.clip_max_norm = clip_max_norm
        self.pool_theta, self.pool_x = pool
        by_default = _FACTOR if self.pool_theta is not None else _FACTOR_WITHOUT_PAIRS
        self.peak_learning_rate = learning_rate * (options.learning_rate_factor or by_default)
        self.pool_weights = torch.ones(len(self.pool_x)) if kernel is None else kernel(self.pool_x)
        if pool_weights is not None:
            self.pool_weights = self.pool_weights * pool_weights
        self.entropy, self.npe_nll, self.trust = entropy, npe_nll, proxy_trust
        self.multipliers = ResilientMultipliers(
            price=options.slack_price,
            step_size=options.dual_step_size,
            max_multiplier=options.max_multiplier,
            initial=options.first_multiplier,
        ).to(self.pool_x.device)
        #: All weights in one vector, where they fit in one; it is the main's while an epoch runs.
        self.vector = flat_copy(main)
        weights = main.parameters() if self.vector is None else [self.vector]
        self.optimizer = Adam(weights, lr=self.peak_learning_rate, fused=can_fuse(main))
        self.step = 0
        self.latest = dict.fromkeys(("forward", "generated", "reverse"), math.nan)

    @property
    def finished(self) -> bool:
        """Whether the annealing schedule has run out."""
        return self.step >= self.num_steps

    def run_epoch(self, next_real: Callable[[], RealBatch]) -> dict[str, float]:
        """Up to `steps_per_epoch` steps; returns the mean of each term over the steps it was in.

        A term that had no turn in a short epoch keeps its last mean; NaN before its first turn.
        """
        self.main.train()
        seen: dict[str, list[float]] = {name: [] for name in self.latest}
        num = min(self.options.steps_per_epoch, self.num_steps - self.step)
        with flattened(self.main, self.vector) as weights:
            for _ in range(num):
                for name, value in self._step(weights, next_real).items():
                    seen[name].append(float(value))
        self.main.eval()
        self.latest |= {name: sum(v) / len(v) for name, v in seen.items() if v}
        return dict(self.latest)

    def _step(
        self, weights: list[nn.Parameter], next_real: Callable[[], RealBatch]
    ) -> dict[str, Tensor]:
        """One gradient step on L.

        G is in every step; R and F are in every fourth, in turn, and count fourfold: unbiased at a
        quarter of their price. F has little weight beside G, and R's samples are the dearest.
        """
        turn = self.step % _PERIOD
        real = next_real() if turn == 1 else None
        terms = self._terms(real if isinstance(real, tuple) else None, with_reverse=turn == 0)
        if isinstance(real, Tensor):
            terms["forward"] = real.mean()
        self.optimizer.zero_grad(set_to_none=False)  # in place: see `flattened`
        self.weigh(terms).backward()
        max_norm = math.inf if self.clip_max_norm is None else self.clip_max_norm
        norm = clip_grad_norm_(weights, max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_learning_rate * annealed(self.step, self.num_steps)
        if bool(torch.isfinite(norm)):  # a non-finite gradient skips the step
            self.optimizer.step()
        self.step += 1
        return {name: term.detach() for name, term in terms.items()}

    def update_multipliers(self, held_out_forward: float) -> None:
        """Dual step on F_val − Ĥ ≤ tolerance + ε, once per epoch; Ĥ takes note of a new best."""
        self.entropy = min(self.entropy, held_out_forward)
        if self.options.adaptive:
            self.multipliers.update([held_out_forward - self.entropy - self.options.tolerance])

    def weigh(self, terms: dict[str, Tensor]) -> Tensor:
        """L = [λ (w_F F + t G) + t R] / (1 + λ) ; F and R, where present, × 4.

        Args:
            terms: Scalars `generated` and, in turn, `forward` or `reverse`.
        """
        lam, t = self.multipliers.multipliers[0], self.trust
        loss = lam * t * terms["generated"]
        if "forward" in terms:
            loss = loss + _PERIOD * lam * (_REAL_WEIGHT * t + (1 - t)) * terms["forward"]
        if "reverse" in terms:
            loss = loss + _PERIOD * t * terms["reverse"]
        return loss / (1 + lam)

    def _terms(
        self, real: tuple[Tensor, Tensor, Tensor] | None, with_reverse: bool
    ) -> dict[str, Tensor]:
        """G on a batch of the pool, and F or R where asked for, by one pass through the main."""
        num_pairs, num_x = self.options.proxy_batch_size, self.options.reverse_batch_size
        rows = torch.multinomial(self.pool_weights, max(num_pairs, num_x), replacement=True)
        x_reverse = self.pool_x[rows[:num_x]]
        if self.pool_theta is None:
            terms = self._reweighted_terms(x_reverse, with_reverse)
            return terms | ({} if real is None else {"forward": self._weighted_nll(real)})
        theta, x = [self.pool_theta[rows[:num_pairs]]], [self.pool_x[rows[:num_pairs]]]
        log_q = None
        if real is not None:
            theta.append(real[0])
            x.append(real[1])
        if with_reverse and self.options.reverse_estimator == "vargrad":
            theta_k, log_q = self._samples(x_reverse, self.options.reverse_samples)
            theta.append(theta_k.flatten(0, 1))
            x.extend([x_reverse] * len(theta_k))
        log_p = self.main.log_prob(torch.cat(theta).unsqueeze(0), torch.cat(x))[0]
        terms = {"generated": forward_term(log_p[:num_pairs])}
        if real is not None:
            terms["forward"] = -(real[2] * log_p[num_pairs:]).mean()
        if log_q is not None:
            log_p_k = log_p[num_pairs:].reshape(log_q.shape)
            terms["reverse"] = reverse_vargrad_loss(log_p_k, log_q, self.options.reverse_barrier)
        elif with_reverse:
            terms["reverse"] = self._path(x_reverse)
        return terms

    def _weighted_nll(self, real: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """F of real pairs with their kernel weights, in a pass of its own."""
        return -(real[2] * self.main.log_prob(real[0].unsqueeze(0), real[1])[0]).mean()

    def _reweighted_terms(self, x: Tensor, with_reverse: bool) -> dict[str, Tensor]:
        """G and R from the main's samples alone, for proxies that have no samples of x."""
        theta_k, log_q = self._samples(x, max(_WAKE_SAMPLES, self.options.reverse_samples))
        with embedded_once(self.main, x):
            log_p = self.main.log_prob(theta_k, x)
        terms = {"generated": reweighted_forward_term(log_p, log_q)}
        if with_reverse and self.options.reverse_estimator == "path":
            terms["reverse"] = self._path(x)
        elif with_reverse:
            terms["reverse"] = reverse_vargrad_loss(log_p, log_q, self.options.reverse_barrier)
        return terms

    @torch.no_grad()
    def _samples(self, x: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
        """Detached θ_k ∼ p_φ(·|x), `(K, B, D)`, and log q̃_ψ(θ_k, x), `(K, B)`."""
        with embedded_once(self.main, x):
            theta = self.main.sample(torch.Size((num_samples,)), x)
        return theta, self.proxy.log_potential(theta, x)

    def _path(self, x: Tensor) -> Tensor:
        """R by the path gradient: samples carry φ, densities are evaluated at frozen φ."""
        theta = reparameterised_sample(self.main, x, self.options.reverse_samples)
        with frozen(self.main):
            log_p_frozen = self.main.log_prob(theta, x)
        log_q = self.proxy.log_potential(theta, x)
        outside = not bool(torch.isfinite(log_q).all())
        log_p = self.main.log_prob(theta.detach(), x) if outside else log_p_frozen
        return reverse_path_loss(log_p_frozen, log_q, log_p, self.options.reverse_barrier)

r"""The loss of one step of the symmetric stage: batches in, a scalar out.

    L = [λ (w_F F + t G) + t R] / (1 + λ),      w_F = 0.1 t + (1 − t),

with the forward term F on training simulations, G, the forward term on pairs drawn from the proxy,
the reverse term R, the multiplier λ and the trust t ∈ (0, 1] in the proxy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.networks.embedding import embedded_once
from sbi_jeffreys.objective import (
    forward_term,
    reverse_vargrad_loss,
)
from sbi_jeffreys.options import JeffreysOptions
from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.training.pool import Pool, tempering_weights

__all__ = ["PERIOD", "RealBatch", "StageLoss", "SymmetricLoss", "weigh"]

#: Training simulations of one step: θ, x and kernel weights, or, where the round's loss is not the
#: negative log density, sbi's losses themselves.
RealBatch = tuple[Tensor, Tensor, Tensor] | Tensor
#: What the stage calls: step, multiplier λ, and a function that returns the next training batch.
StageLoss = Callable[[int, Tensor, Callable[[], RealBatch]], tuple[Tensor, dict[str, Tensor]]]

PERIOD = 4  # steps between two turns of R, and of F
_REAL_WEIGHT = 0.1  # w_F at full trust: the weight of training simulations beside proxy pairs
_AVERAGE = 0.9  # weight of earlier turns in the moving average of F


def weigh(
    terms: dict[str, Tensor], multiplier: Tensor, trust: float, satisfied: bool = False
) -> Tensor:
    """L = [λ (w_F F + t G) + t R] / (1 + λ); F and R are in every fourth step and count fourfold.

    Args:
        terms: Scalars `generated` (G) and, in turn, `forward` (F) or `reverse` (R).
        multiplier: λ ≥ 0.
        trust: t in (0, 1].
        satisfied: Whether F has reached Ĥ, so that it has no weight.
    """
    loss = multiplier * trust * terms["generated"]  # mutant: g-off, g-without-trust
    if "forward" in terms and not satisfied:  # mutant: training-pairs-overfitted
        weight = _REAL_WEIGHT * trust + (1 - trust)  # mutant: f-without-distrust
        loss = loss + PERIOD * multiplier * weight * terms["forward"]  # mutant: f-off
    if "reverse" in terms:
        loss = loss + PERIOD * trust * terms["reverse"]  # mutant: r-off, r-without-trust
    return loss / (1 + multiplier)


class SymmetricLoss:
    """L of one step on fresh batches; picklable.

    G is in every step. R and F are in every fourth, in turn, and count fourfold: unbiased at a
    quarter of their cost. F has little weight beside G, and the samples of R are expensive. F has
    no weight while its average over training pairs is below Ĥ, the best value that any model has
    reached on held-out pairs: the constraint is then satisfied, and lower values are overfitting.

    Args:
        main: The density estimator.
        proxy: A fitted proxy.
        pool: Observations for G and R.
        options: Sizes of the batches and the barrier of R.
        trust: t in (0, 1].
    """

    def __init__(
        self,
        main: ConditionalDensityEstimator,
        proxy: Proxy,
        pool: Pool,
        options: JeffreysOptions,
        trust: float,
    ) -> None:
        self.main, self.proxy, self.pool = main, proxy, pool
        self.options, self.trust = options, trust
        #: Ĥ, which the stage sets.
        self.entropy = -math.inf
        self._forward = math.nan  # moving average of F; NaN where it is not in the units of Ĥ

    def __call__(
        self, step: int, multiplier: Tensor, next_real: Callable[[], RealBatch]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L and the terms it is made of.

        Args:
            step: Number of the step, from 0, which decides whether R or F is evaluated.
            multiplier: λ.
            next_real: Returns the next batch of training simulations.
        """
        self._renew_pool(step)
        terms = self.terms(step, next_real)
        satisfied = self._forward < self.entropy  # False while either is unknown
        return weigh(terms, multiplier, self.trust, satisfied), terms

    def _note_forward(self, value: float) -> None:
        """Take F of a batch of training pairs into its moving average."""
        before = value if math.isnan(self._forward) else self._forward
        self._forward = _AVERAGE * before + (1 - _AVERAGE) * value

    def _renew_pool(self, step: int) -> None:
        """Draw the pool anew once its pairs were used `pool.uses` times on average."""
        # The pool may have fewer pairs than were asked for; at its own size it would shrink.
        size = self.pool.asked or len(self.pool.x)  # mutant: pool-shrinks
        every = max(1, self.pool.uses * size // self.options.proxy_batch_size)
        if self.pool.renewable and step > 0 and step % every == 0:  # mutant: pool-never-renewed
            theta, x = self.proxy.sample_joint(size)
            self.pool.theta, self.pool.x = theta, x
            self.pool.asked = size  # mutant: old-pool-shrinks
            # mutant: renewed-at-gamma-one
            self.pool.weights = tempering_weights(self.proxy, theta, x)

    def terms(self, step: int, next_real: Callable[[], RealBatch]) -> dict[str, Tensor]:
        """`generated`, and in turn `reverse` (steps 0, 4, …) or `forward` (steps 1, 5, …)."""
        turn = step % PERIOD
        real = next_real() if turn == 1 else None
        with_reverse = turn == 0
        pairs = real if isinstance(real, tuple) else None
        if self.pool.grouped:
            terms = self._grouped_terms(with_reverse)
            if pairs is not None:
                theta, x, weights = pairs
                log_p = self.main.log_prob(theta.unsqueeze(0), x)[0]
                terms["forward"] = forward_term(log_p, weights)
        else:
            terms = self._pool_terms(pairs, with_reverse)
        if isinstance(real, Tensor):
            terms["forward"] = real.mean()
        elif "forward" in terms:
            self._note_forward(float(terms["forward"].detach()))
        return terms

    def _pool_terms(
        self, real: tuple[Tensor, Tensor, Tensor] | None, with_reverse: bool
    ) -> dict[str, Tensor]:
        """G on pairs of the pool, and F or R where asked for, by one pass through the main."""
        num_pairs, num_x = self.options.proxy_batch_size, self.options.reverse_batch_size
        rows = self.pool.draw(max(num_pairs, num_x))
        theta, x = [self.pool.theta[rows[:num_pairs]]], [self.pool.x[rows[:num_pairs]]]
        log_q = None
        if real is not None:
            theta.append(real[0])
            x.append(real[1])
        if with_reverse:
            x_reverse = self.pool.x[rows[:num_x]]
            theta_k, log_q = self._samples(x_reverse, self.options.reverse_samples)
            theta.append(theta_k.flatten(0, 1))
            x.extend([x_reverse] * len(theta_k))
        log_p = self.main.log_prob(torch.cat(theta).unsqueeze(0), torch.cat(x))[0]
        terms = {"generated": forward_term(log_p[:num_pairs])}
        if real is not None:
            terms["forward"] = forward_term(log_p[num_pairs:], real[2])
        if log_q is not None:
            log_p_k = log_p[num_pairs:].reshape(log_q.shape)
            terms["reverse"] = reverse_vargrad_loss(log_p_k, log_q, self.options.reverse_barrier)
        return terms

    def _grouped_terms(self, with_reverse: bool) -> dict[str, Tensor]:
        """G and R at observations with several θ̃ each, every observation embedded once."""
        num_pairs, num_x = self.options.proxy_batch_size, self.options.reverse_batch_size
        rows = self.pool.draw(num_x)
        x, num = self.pool.x[rows], max(1, num_pairs // num_x)
        theta, log_q = self.pool.theta_at(rows, num), None
        if with_reverse:
            theta_k, log_q = self._samples(x, self.options.reverse_samples)
            theta = torch.cat([theta, theta_k])
        with embedded_once(self.main, x):
            log_p = self.main.log_prob(theta, x)
        terms = {"generated": forward_term(log_p[:num])}
        if log_q is not None:
            barrier = self.options.reverse_barrier
            terms["reverse"] = reverse_vargrad_loss(log_p[num:], log_q, barrier)
        return terms

    @torch.no_grad()
    def _samples(self, x: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
        """Detached θ_k ∼ p_φ(·|x), `(K, B, D)`, and log q̃_ψ(θ_k, x), `(K, B)`."""
        with embedded_once(self.main, x):
            theta = self.main.sample(torch.Size((num_samples,)), x)
        return theta, self.proxy.log_potential(theta, x)

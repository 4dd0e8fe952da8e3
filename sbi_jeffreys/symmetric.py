r"""The symmetric stage: main and proxy fitted to each other under adaptive priorities.

    minimise R    subject to    F_val − Ĥ ≤ ε,      Ĥ = min over main and proxy of held-out NLL so far

The forward constraint is read on held-out simulations, while its gradient comes from surrogates
(the proxy-Lagrangian of Cotter et al. 2019): the forward term F on the training simulations and G,
the forward term on pairs drawn from the proxy, which are unlimited and let λ grow without
overfitting. With trust t ∈ (0, 1] in the proxy, one step descends

    L = [λ (w_F F + t G) + t R] / (1 + λ),      w_F = 0.1 t + (1 − t),

and per epoch λ takes a resilient dual step (`sbi_jeffreys.multipliers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.clip_grad import clip_grad_norm_
from torch.optim import Adam

from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.estimators import frozen, reparameterised_sample
from sbi_jeffreys.multipliers import ResilientMultipliers, trust
from sbi_jeffreys.objective import (
    forward_term,
    reverse_path_loss,
    reverse_vargrad_loss,
    reweighted_forward_term,
)
from sbi_jeffreys.options import JeffreysOptions
from sbi_jeffreys.proxies.base import Proxy

__all__ = ["SymmetricStage"]

_REAL_WEIGHT = 0.1  # w_F at full trust: what real simulations add to unlimited proxy pairs
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
        options: Weights, sizes, schedule.
        learning_rate: `train`'s learning rate; the peak here is `learning_rate_factor` times that.
        clip_max_norm: Gradient norm bound or None.
        pool: Observations for the reverse term, shape `(N, *x_shape)`, and, where they were drawn
            from the proxy's joint, their θ `(N, D)`; θ None means "reweight the main's samples".
        kernel: Calibration kernel: pool observations are drawn in proportion to it.
        entropy: Ĥ at the start: the best held-out NLL of main and proxy so far.
        proxy_trust: t ∈ (0, 1].
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
        proxy_trust: float,
    ) -> None:
        self.main, self.proxy, self.options = main, proxy, options
        self.peak_learning_rate = learning_rate * options.learning_rate_factor
        self.clip_max_norm = clip_max_norm
        self.pool_theta, self.pool_x = pool
        self.pool_weights = torch.ones(len(self.pool_x)) if kernel is None else kernel(self.pool_x)
        self.entropy, self.trust = entropy, proxy_trust
        self.multipliers = ResilientMultipliers(
            price=options.slack_price,
            step_size=options.dual_step_size,
            max_multiplier=options.max_multiplier,
            initial=options.initial_multiplier,
        ).to(self.pool_x.device)
        self.optimizer = Adam(main.parameters(), lr=self.peak_learning_rate, fused=True)
        self.step = 0

    @property
    def finished(self) -> bool:
        """Whether the annealing schedule has run out."""
        return self.step >= self.options.num_steps

    def run_epoch(self, real_losses: Callable[[], Tensor]) -> dict[str, float]:
        """Up to `steps_per_epoch` steps; returns the mean of each term, in nats."""
        self.main.train()
        sums: dict[str, float] = {}
        num = min(self.options.steps_per_epoch, self.options.num_steps - self.step)
        for _ in range(num):
            for name, value in self._step(real_losses).items():
                sums[name] = sums.get(name, 0.0) + value / num
        self.main.eval()
        return sums

    def _step(self, real_losses: Callable[[], Tensor]) -> dict[str, float]:
        """One gradient step on L; a non-finite gradient skips it."""
        terms = {"forward": real_losses().mean(), **self._proxy_terms()}
        loss = self.weigh(terms)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        max_norm = math.inf if self.clip_max_norm is None else self.clip_max_norm
        norm = clip_grad_norm_(self.main.parameters(), max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_learning_rate * annealed(self.step, self.options.num_steps)
        if bool(torch.isfinite(norm)):
            self.optimizer.step()
        self.step += 1
        return {name: float(term.detach()) for name, term in terms.items()}

    def update_multipliers(self, held_out_forward: float) -> None:
        """Dual step on F_val − Ĥ ≤ tolerance + ε, once per epoch; Ĥ takes note of a new best."""
        self.entropy = min(self.entropy, held_out_forward)
        if self.options.adaptive:
            self.multipliers.update([held_out_forward - self.entropy - self.options.tolerance])

    def weigh(self, terms: dict[str, Tensor]) -> Tensor:
        """L = [λ (w_F F + t G) + t R] / (1 + λ) from the terms `forward`, `generated`, `reverse`."""
        lam, t = self.multipliers.multipliers[0], self.trust
        real = (_REAL_WEIGHT * t + (1 - t)) * terms["forward"]
        return (lam * (real + t * terms["generated"]) + t * terms["reverse"]) / (1 + lam)

    def _proxy_terms(self) -> dict[str, Tensor]:
        """G and the reverse loss on a batch of the pool, from one pass through the main."""
        num_pairs, num_x = self.options.proxy_batch_size, self.options.reverse_batch_size
        rows = torch.multinomial(self.pool_weights, max(num_pairs, num_x), replacement=True)
        x = self.pool_x[rows]
        x_reverse = x[:num_x]
        if self.options.reverse_estimator == "path":
            reverse = self._path(x_reverse)
            log_p = self.main.log_prob(self._theta(rows[:num_pairs]).unsqueeze(0), x[:num_pairs])
            return {"generated": forward_term(log_p), "reverse": reverse}
        theta_k = self.sample(x_reverse, self.options.reverse_samples)
        with torch.no_grad():
            log_q = self.proxy.log_potential(theta_k, x_reverse)
        if self.pool_theta is None:
            log_p_k = self.main.log_prob(theta_k, x_reverse)
            generated = reweighted_forward_term(log_p_k, log_q)
        else:
            flat = theta_k.reshape(-1, theta_k.shape[-1])
            theta = torch.cat([self._theta(rows[:num_pairs]), flat]).unsqueeze(0)
            x_all = torch.cat([x[:num_pairs], *([x_reverse] * len(theta_k))])
            log_p = self.main.log_prob(theta, x_all)[0]
            generated = forward_term(log_p[:num_pairs])
            log_p_k = log_p[num_pairs:].reshape(len(theta_k), -1)
        reverse = reverse_vargrad_loss(log_p_k, log_q, self.options.reverse_barrier)
        return {"generated": generated, "reverse": reverse}

    def _theta(self, rows: Tensor) -> Tensor:
        if self.pool_theta is None:
            raise RuntimeError("This pool has no theta; the forward term is reweighted instead.")
        return self.pool_theta[rows]

    @torch.no_grad()
    def sample(self, x: Tensor, num_samples: int) -> Tensor:
        """Detached θ_k ∼ p_φ(·|x): `(num_samples, B, D)` for x `(B, *x_shape)`."""
        return self.main.sample(torch.Size((num_samples,)), x)

    def _path(self, x: Tensor) -> Tensor:
        """R by the path gradient: samples carry φ, densities are evaluated at frozen φ."""
        theta = reparameterised_sample(self.main, x, self.options.reverse_samples)
        with frozen(self.main):
            log_p_frozen = self.main.log_prob(theta, x)
        log_q = self.proxy.log_potential(theta, x)
        outside = not bool(torch.isfinite(log_q).all())
        log_p = self.main.log_prob(theta.detach(), x) if outside else log_p_frozen
        return reverse_path_loss(log_p_frozen, log_q, log_p, self.options.reverse_barrier)

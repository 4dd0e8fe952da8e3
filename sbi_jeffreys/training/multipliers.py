r"""Resilient primal–dual multipliers: priorities that adapt while training goes on.

A resilient constrained problem (Hounie, Ribeiro & Chamon, NeurIPS 2023, arXiv 2306.02426)

    minimise over φ, ε ≥ 0    f(φ) + h(ε)    subject to    g_i(φ) ≤ ε_i,  i = 1 … m

lets a requirement g_i ≤ 0 that cannot be met give way by a slack ε_i, at the price h(ε). Its
saddle point is found by descent in φ on f + Σ λ_i g_i, and per dual step

    λ ← [λ + η (g − ε)]₊ ,        ε = (∇h)⁻¹(λ).

The second line is the slack's stationarity condition ∇h(ε) = λ in closed form. With the quadratic
price h(ε) = ½ α ε² it reads ε = λ/α: a multiplier settles at the finite value λ_i = α [g_i]₊, "how
badly the requirement is missed, times its price". The Huber price is quadratic up to
λ_max and linear beyond, which caps the multiplier at λ_max: the least feasible requirement cannot
take over the whole objective.

This module needs torch only: it can be used without sbi and without a trainer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["ResilientMultipliers", "trust"]


def trust(proxy_nll: float | Tensor, main_nll: float | Tensor) -> Tensor:
    """How far the proxy may be followed: t = exp(−(P_val − V_main)₊) ∈ (0, 1].

    A likelihood ratio per held-out pair: 1 while the proxy explains held-out pairs at least as well
    as the reference main, and e⁻¹ once it is one nat per pair worse.

    Args:
        proxy_nll: Held-out −log q_ψ(θ|x) of the (normalised) proxy, in nats per pair.
        main_nll: Held-out −log p_φ(θ|x) of the reference main, in nats per pair.

    Returns:
        Scalar tensor; 0 if the proxy's value is not finite.
    """
    gap = torch.as_tensor(proxy_nll, dtype=torch.float64) - torch.as_tensor(
        main_nll, dtype=torch.float64
    )
    # mutant: trust-constant
    return torch.where(torch.isfinite(gap), torch.exp(-gap.clamp(min=0.0)), torch.zeros_like(gap))


class ResilientMultipliers(nn.Module):
    """Multipliers λ and slacks ε of m inequality constraints, as buffers.

    They move with `.to(device)`, and enter `state_dict` and pickles like any module.

    Args:
        num_constraints: m ≥ 1.
        price: α > 0, the curvature of the slack's price h(ε), so that λ = α ε: a violation of one
            nat that persists drives its multiplier to α.
        step_size: η in (0, 1], the share of the way to its target α g that λ goes in one dual step,
            λ ← [λ + η α (g − ε)]₊.
        max_multiplier: λ_max > 0, where the Huber price becomes linear.
        initial: λ at the start, in [0, λ_max].

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> m = ResilientMultipliers(1, price=10.0, step_size=0.5)
        >>> for _ in range(100):
        ...     _ = m.update([0.2])     # a requirement missed by 0.2, forever
        >>> round(m.multipliers.item(), 3), round(m.slack.item(), 3)
        (2.0, 0.2)
    """

    multipliers: Tensor
    slack: Tensor

    def __init__(
        self,
        num_constraints: int = 1,
        price: float = 20.0,
        step_size: float = 0.3,
        max_multiplier: float = 100.0,
        initial: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("price", price),
            ("step_size", step_size),
            ("max_multiplier", max_multiplier),
        ):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        if step_size > 1:
            raise ValueError(
                f"step_size must be at most 1, got {step_size}: beyond it the multiplier "
                "overshoots its target every step."
            )
        if not 0 <= initial <= max_multiplier:
            raise ValueError(
                f"initial must be in [0, max_multiplier={max_multiplier}], got {initial}."
            )
        if num_constraints < 1:
            raise ValueError(f"num_constraints must be at least 1, got {num_constraints}.")
        self.price, self.step_size, self.max_multiplier = price, step_size, max_multiplier
        self.register_buffer("multipliers", torch.full((num_constraints,), float(initial)))
        self.register_buffer("slack", self.multipliers / price)

    @torch.no_grad()
    def update(self, violations: Sequence[float] | Tensor) -> Tensor:
        """One dual ascent step and the slack's closed form.

        Args:
            violations: g_i, shape `(m,)`: positive where the requirement is missed. A non-finite
                entry (a failed evaluation) leaves its multiplier as it is.

        Returns:
            The new multipliers, shape `(m,)`.
        """
        g = torch.as_tensor(
            violations, dtype=self.multipliers.dtype, device=self.multipliers.device
        )
        if g.shape != self.multipliers.shape:
            raise ValueError(
                f"violations must have shape {tuple(self.multipliers.shape)}, one value per "
                f"constraint, got {tuple(g.shape)}."
            )
        # mutant: slack-off
        proposed = self.multipliers + self.step_size * self.price * (g - self.slack)
        proposed = proposed.clamp(0.0, self.max_multiplier)  # mutant: cap-off
        self.multipliers.copy_(torch.where(torch.isfinite(g), proposed, self.multipliers))
        self.slack.copy_(self.multipliers / self.price)
        return self.multipliers

r"""The symmetric stage: a thin loop of gradient steps and dual steps over an explicit loss.

    minimise R   subject to   F_val − Ĥ ≤ ε,   Ĥ = best held-out NLL of main and proxy so far

The forward constraint is evaluated on held-out simulations, while its gradient comes from
surrogates (the proxy-Lagrangian of Cotter et al. 2019): F on training simulations and G on pairs
drawn from the proxy, which are unlimited, so that λ can grow without overfitting. Every step is a
gradient step of the main on the loss (`sbi_jeffreys.training.loss`), and every epoch ends with a
resilient dual step of λ (`sbi_jeffreys.training.multipliers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.clip_grad import clip_grad_norm_
from torch.optim import Adam

from sbi_jeffreys.networks.fitting import can_fuse
from sbi_jeffreys.networks.flat import flat_copy, flattened, shapes_of
from sbi_jeffreys.networks.muon import Muon
from sbi_jeffreys.options import JeffreysOptions
from sbi_jeffreys.training.loss import RealBatch, StageLoss, SymmetricLoss
from sbi_jeffreys.training.multipliers import ResilientMultipliers

__all__ = ["APART", "SymmetricStage"]

_FACTOR, _FACTOR_WITHOUT_PAIRS = 30.0, 20.0  # peak learning rate in units of plain NPE's
# Of a restart: a half would need three restarts where steps are ten times too large.
_SLOWER = 1 / 3
_WARM_UP = 0.1  # fraction of steps over which the learning rate rises
# Half the variance of log p − log q shortly before half of the stage: above the first value, mains
# were still 0.3 to 1.6 nats behind their proxies at the stage's end; below the second, hardly 0.1.
APART, _CLOSE = 1.75, 0.35
# Share of its steps after which a stage keeps its length: the learning rate has fallen far, and the
# steps up to three quarters, where a shortened stage ends, are too few to anneal the rest.
_TOO_LATE = 0.625


def annealed(step: int, num_steps: int) -> float:
    """Learning-rate factor in [0, 1]: linear warm-up, then cosine decay to zero."""
    warm_up = max(1, round(_WARM_UP * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, num_steps - warm_up)))


class SymmetricStage:
    """State and steps of the symmetric stage. Picklable at any moment.

    Args:
        loss: The loss; its main is trained.
        options: Options of the multipliers and the steps.
        learning_rate: `train`'s learning rate; the peak is `learning_rate_factor` times that.
        clip_max_norm: Gradient norm bound or None.
        entropy: Ĥ at the start: the best held-out NLL of main and proxy so far.
        npe_nll: V_NPE, plain NPE's held-out value, which the result may exceed by one standard
            error at most.
        num_steps: Length of the stage; the learning rate is annealed over it.

    Attributes:
        num_steps: As given, or what `adapt_length` made of it.
        skipped: Steps that were left out because their gradient was not finite.
        doublings: How often the stage was made twice as long.
    """

    def __init__(
        self,
        loss: SymmetricLoss,
        options: JeffreysOptions,
        learning_rate: float,
        clip_max_norm: float | None,
        entropy: float,
        npe_nll: float,
        num_steps: int,
    ) -> None:
        self.main, self.proxy, self.pool, self.trust = loss.main, loss.proxy, loss.pool, loss.trust
        self.loss: StageLoss = loss
        self._symmetric_loss = loss  # also where an ablation replaces `loss`
        self.options, self.num_steps, self.clip_max_norm = options, num_steps, clip_max_norm
        by_default = _FACTOR_WITHOUT_PAIRS if self.pool.grouped else _FACTOR
        self.peak_learning_rate = learning_rate * (options.learning_rate_factor or by_default)
        self.entropy, self.npe_nll = entropy, npe_nll
        self.multipliers = ResilientMultipliers(
            price=options.slack_price,
            step_size=options.dual_step_size,
            max_multiplier=options.max_multiplier,
            initial=options.first_multiplier,
        ).to(self.pool.x.device)
        #: All weights in one vector, if one can hold them. While an epoch runs, the main's weights
        #: are views of it.
        self.vector = flat_copy(self.main)
        self.optimizer = self._new_optimizer()
        self.step = self.skipped = self.doublings = 0
        self._settled = False  # whether the length is final
        self._reverse: list[float] = []  # R's loss, epoch by epoch, shortly before half
        self.latest = dict.fromkeys(("forward", "generated", "reverse"), math.nan)

    def _new_optimizer(self) -> Adam:
        how = {"lr": self.peak_learning_rate, "fused": can_fuse(self.main)}
        if self.vector is None:
            return Adam(self.main.parameters(), **how)
        return Muon(self.vector, shapes_of(self.main), **how)

    @property
    def finished(self) -> bool:
        """Whether the annealing schedule has run out."""
        return self.step >= self.num_steps

    @property
    def at_bound(self) -> bool:
        """Whether λ is at its upper bound."""
        return float(self.multipliers.multipliers[0]) >= self.options.max_multiplier

    def run_epoch(self, next_real: Callable[[], RealBatch]) -> dict[str, float]:
        """Run the steps up to the end of the epoch; return each term's mean over its steps.

        An epoch has `steps_per_epoch` steps; one that was interrupted is completed. A term that was
        in no step of a short epoch keeps its last mean, which is NaN before its first step.
        """
        self.main.train()
        seen: dict[str, list[float]] = {name: [] for name in self.latest}
        size = self.options.steps_per_epoch
        num = min(size - self.step % size, self.num_steps - self.step)
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
        """One gradient step on the loss; returns its terms."""
        loss, terms = self.loss(self.step, self.multipliers.multipliers[0], next_real)
        self.optimizer.zero_grad(set_to_none=False)  # in place: see `flattened`
        loss.backward()
        max_norm = math.inf if self.clip_max_norm is None else self.clip_max_norm
        norm = clip_grad_norm_(weights, max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_learning_rate * annealed(self.step, self.num_steps)
        if bool(torch.isfinite(norm)):  # mutant: non-finite-steps
            self.optimizer.step()
        else:
            self.skipped += 1
        self.step += 1
        return {name: term.detach() for name, term in terms.items()}

    def update_multipliers(self, held_out_forward: float) -> None:
        """Dual step on F_val − Ĥ ≤ tolerance + ε, once per epoch; a new best value lowers Ĥ."""
        self.entropy = min(self.entropy, held_out_forward)  # mutant: entropy-frozen
        self._symmetric_loss.entropy = self.entropy
        if self.options.adaptive:  # mutant: lambda-frozen
            # mutant: tolerance-off
            self.multipliers.update([held_out_forward - self.entropy - self.options.tolerance])

    def adapt_length(self) -> None:
        """After an epoch: at half of its length, make the stage twice as long, or end it sooner.

        The decision is by the loss of R, half the variance of log p − log q, which is zero where
        main and proxy agree, costs nothing more, and needs neither held-out pairs nor log Z. Each
        doubling costs twice as much as the one before, so the bound on that loss is twice as high.
        The learning rate is annealed over the new length from where it is. The length is kept if
        the first epoch to end in the second half ends after five eighths of the stage, as in a
        stage of very few epochs. An explicit `JeffreysOptions.num_steps` is not touched.
        """
        if self._settled or self.options.num_steps is not None:  # mutant: length-asked-for-adapted
            return
        if 8 * self.step > 3 * self.num_steps:
            self._reverse.append(self.latest["reverse"])
        if 2 * self.step < self.num_steps:
            return
        if self.step >= _TOO_LATE * self.num_steps:  # mutant: annealed-stage-adapted
            self._settled = True
            return
        apart = sum(self._reverse) / len(self._reverse)
        self._reverse = []
        bound = APART * 2**self.doublings  # mutant: second-doubling-as-cheap-as-the-first
        if apart > bound and self.doublings < self.options.max_doublings:
            self.num_steps *= 2  # mutant: stage-never-longer
            self.doublings += 1
            return
        self._settled = True
        if apart < _CLOSE:
            self.num_steps -= self.num_steps // 4  # mutant: stage-never-shorter

    def restart_slower(self, weights: dict[str, Tensor]) -> None:
        """Begin the schedule again, from these weights and at a third of the step size.

        The first steps of a new optimiser are as large as its learning rate, so that without a
        warm-up they diverge where the stage's own beginning does not.
        """
        self.main.load_state_dict(weights)
        self.step, self._reverse = 0, []  # mutant: restarted-without-warm-up
        self.peak_learning_rate *= _SLOWER
        self.optimizer = self._new_optimizer()

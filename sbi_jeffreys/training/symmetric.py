"""The one record of the symmetric part of a training, and the loop over its epochs."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sbi_jeffreys.diagnostics.calibration import CoverageCurve, mean_and_error
from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.training.held_out import HeldOut
from sbi_jeffreys.training.loss import RealBatch
from sbi_jeffreys.training.report import Kept, StageStatus
from sbi_jeffreys.training.stage import SymmetricStage

__all__ = ["TRACES", "Best", "SymmetricTraining"]

# Nats above plain NPE's loss, beyond three standard errors, at which the stage counts as diverged:
# in its first and in its second half.
_EXCESS_EARLY, _EXCESS_LATE, _ERRORS = 6.0, 0.5, 3.0
_MAX_RESTARTS = 2

#: Per-epoch traces of the symmetric stage in `summary`, all in nats except the last three.
TRACES = (
    "forward_term",
    "generated_term",
    "reverse_term",
    "held_out_forward",
    "held_out_reverse",
    "entropy_estimate",
    "multiplier",
    "slack",
    "trust",
)


@dataclass(frozen=True)
class Best:
    """The weights to hand out, with their held-out value. Replaced whole, so that an interrupt
    cannot separate the two."""

    value: float
    losses: Tensor  # of the held-out pairs, `(M,)`
    weights: dict[str, Tensor]
    kept: Kept


@dataclass
class SymmetricTraining:
    """State of the symmetric part of a training: picklable, and all there is beside the network.

    Attributes:
        stage: The stage with its multipliers and optimiser.
        best: The weights to hand out.
        plain: Held-out losses of plain NPE, `(M,)`, which the guard compares with.
        proxy_losses: Held-out losses of the proxy, `(M,)`; after the stage, the larger of two
            estimates.
        last_weights: Weights of the last step, while the best ones are in the main; else None.
        status: How far the stage got.
        restarts: How often the stage began again, at a third of the step size.
        coverage_before: Coverage of plain NPE on held-out pairs; None in later rounds.
        coverage_after: Coverage of the main that is kept.
        start: Weights that the stage started from: plain NPE's after the changes of `begin_stage`.
        weights: Weights of the held-out pairs, `(M,)`; None before the first call of `run`.
        always_at_bound: Whether λ was at its upper bound in the second half of the stage.
        judged: Whether the weights of the last epoch were evaluated, and kept or not.
    """

    stage: SymmetricStage
    best: Best
    plain: Tensor
    proxy_losses: Tensor | None
    last_weights: dict[str, Tensor] | None = None
    status: StageStatus = StageStatus.PAUSED
    restarts: int = 0
    always_at_bound: bool = True
    coverage_before: CoverageCurve | None = None
    coverage_after: CoverageCurve | None = None
    start: dict[str, Tensor] | None = None  # None in pickles from before there was one
    judged: bool = True
    weights: Tensor | None = None

    @property
    def proxy(self) -> Proxy:
        """The stage's proxy."""
        return self.stage.proxy

    @property
    def ended_with_plain(self) -> bool:
        """Whether the stage is over and plain NPE's weights are the ones that are kept."""
        return self.status is not StageStatus.PAUSED and self.best.kept is Kept.PLAIN_NPE

    def run(
        self,
        held_out: HeldOut,
        next_real: Callable[[], RealBatch],
        max_epochs: int,
        on_epoch: Callable[[dict[str, float], float, float], None],
        after_epoch: Callable[[], None],
        show_progress_bars: bool,
    ) -> int:
        """Run what is left of the stage, at most `max_epochs` epochs; leave the best weights.

        However the run ends, also by an interrupt or another exception, the main has its best
        weights afterwards and is in evaluation mode.

        Args:
            held_out: Held-out pairs.
            next_real: Returns the next batch of training simulations.
            max_epochs: Bound on the epochs of this call.
            on_epoch: Called after every epoch with the values of `TRACES`, the training loss, and
                the seconds that the epoch took.
            after_epoch: Called when an epoch is complete and training could be resumed from it.
            show_progress_bars: Whether to show progress.

        Returns:
            Number of epochs run.
        """
        stage, self.weights = self.stage, held_out.weights  # mutant: errors-without-weights
        if self.status is StageStatus.STOPPED:
            return 0
        bar = tqdm(total=stage.num_steps, desc="Symmetric stage", disable=not show_progress_bars)
        epochs = 0
        try:
            self.resume()
            # mutant: interrupted-last-epoch-left-out
            while epochs < max_epochs and not (stage.finished and self.judged):
                start = time.perf_counter()
                self.judged = False
                terms = stage.run_epoch(next_real)  # takes no step where only judging is left
                losses = held_out.main_losses(stage.main, self.proxy)
                value = held_out.mean(losses)
                self.keep(value, losses)
                traces = self._traces(terms, value, held_out)
                self.judged = True
                on_epoch(traces, terms["forward"], time.perf_counter() - start)
                stage.update_multipliers(value)
                if 2 * stage.step > stage.num_steps:
                    self.always_at_bound &= stage.at_bound
                stage.adapt_length()
                epochs += 1
                bar.n, bar.total = stage.step, stage.num_steps
                bar.set_postfix(held_out=f"{value:.3f}", best=f"{self.best.value:.3f}")
                if self._diverged(held_out, losses) and not self._restart():
                    break
                after_epoch()
        finally:
            bar.close()
            self.pause()
        return epochs

    def evaluate(self, held_out: HeldOut, before: Tensor | None) -> None:
        """Evaluate the main that is kept, and once more the proxy, with this main as the proposal.

        Both estimates of the proxy's losses tend to be too low, so the larger one counts.

        Args:
            held_out: Held-out pairs.
            before: The proxy's losses as estimated before the stage, `(M,)`.
        """
        after, _ = held_out.proxy_losses(self.proxy, self.stage.main)
        self.proxy_losses = after if before is None else torch.maximum(before, after)
        if not held_out.atomic:
            self.coverage_after = held_out.coverage(self.stage.main, self.proxy.prior)

    def keep(self, value: float, losses: Tensor) -> None:
        """Keep the main's weights if they are the best yet; at the end, prefer the annealed ones.

        The minimum over epochs of a loss on ten or a hundred held-out pairs is more often low by
        chance than because the epoch is better. All iterates within the tolerance satisfy the
        constraint, and of those the last one has the smallest R. So the last one is kept, unless it
        is behind the best one by more than the tolerance and three standard errors of the
        difference, or by more than one standard error behind plain NPE, whose epoch was chosen by
        these very pairs.

        Args:
            value: Held-out value of the main as it is now.
            losses: The losses of which `value` is the mean, `(M,)`.
        """
        stage = self.stage
        # mutant: lucky-epochs-kept
        margin = stage.options.tolerance + _ERRORS * self._error(losses - self.best.losses)
        floor = stage.npe_nll + self._error(losses - self.plain)  # mutant: npe-by-its-luck
        bound = min(self.best.value + margin, floor)  # mutant: npe-not-a-floor
        annealed = stage.finished and value <= bound
        if value < self.best.value or annealed:
            kept = Kept.LAST if stage.finished else Kept.BEST
            self.best = Best(value, losses, deepcopy(stage.main.state_dict()), kept)

    def _diverged(self, held_out: HeldOut, losses: Tensor) -> bool:
        """Whether the main's held-out loss is clearly above plain NPE's.

        Early in the stage, large steps may raise it by some nats, which later steps make up for:
        the bound falls at half of the stage.
        """
        excess = losses - self.plain
        error = self._error(excess)
        late = 2 * self.stage.step > self.stage.num_steps
        margin = (_EXCESS_LATE if late else _EXCESS_EARLY) + _ERRORS * error
        # mutant: guard-off
        return not held_out.mean(excess) <= margin  # also where either is NaN

    def _restart(self) -> bool:
        """Start again at a third of the step size; False if the stage has to stop.

        The stage starts from its best weights, and stops if it is finished or was restarted twice.
        While plain NPE's weights are the best, the stage goes back to those that it started from,
        because plain NPE's weights lack the changes of `begin_stage`.
        """
        if self.stage.finished or self.restarts >= _MAX_RESTARTS:
            self.status = StageStatus.STOPPED
            return False
        self.restarts += 1
        weights = self.best.weights
        # mutant: restarted-from-plain-npe
        if self.best.kept is Kept.PLAIN_NPE and self.start is not None:
            weights = self.start
        self.stage.restart_slower(weights)
        return True

    def pause(self) -> None:
        """Put the best weights into the main, and keep the last ones for resuming."""
        main = self.stage.main
        if self.status is StageStatus.STOPPED:
            self.last_weights = None
        elif self.stage.finished and self.judged:  # mutant: last-epoch-not-judged
            self.status = StageStatus.FINISHED
        elif self.last_weights is None:
            self.last_weights = deepcopy(main.state_dict())
        main.load_state_dict(self.best.weights)
        main.eval()

    def resume(self) -> None:
        """Put the last weights back into the main."""
        if self.last_weights is not None:
            self.stage.main.load_state_dict(self.last_weights)
            self.last_weights = None

    def _traces(self, terms: dict[str, float], value: float, held_out: HeldOut) -> dict[str, float]:
        stage = self.stage
        values = (
            terms["forward"],
            terms["generated"],
            terms["reverse"],
            value,
            held_out.reverse(stage.main, self.proxy),
            stage.entropy,
            float(stage.multipliers.multipliers[0]),
            float(stage.multipliers.slack[0]),
            stage.trust,
        )
        return dict(zip(TRACES, values))

    def _error(self, losses: Tensor) -> float:
        """Standard error of the mean of losses `(M,)`; 0 where only one of them counts."""
        alone = len(losses) == 1 or (
            self.weights is not None and int((self.weights > 0).sum()) == 1
        )
        return 0.0 if alone else mean_and_error(losses, self.weights)[1]

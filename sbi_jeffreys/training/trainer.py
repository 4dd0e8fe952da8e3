"""The training behind `NPE_Jeffreys`: sbi's loop, then the symmetric stage; resumable anywhere.

Hooks into sbi's trainer, all private to it, are here and in `npe.py`, and nowhere else.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from sbi_jeffreys._sbi import (
    NPE_C,
    ConditionalDensityEstimator,
    LossArgs,
    LossArgsNPE,
    TrainConfig,
)
from sbi_jeffreys.options import JeffreysOptions
from sbi_jeffreys.proxies import Proxy, hand_back_embedding
from sbi_jeffreys.training.held_out import HeldOut
from sbi_jeffreys.training.preparation import Prepared, Simulations, prepare
from sbi_jeffreys.training.stage import RealBatch, SymmetricStage

__all__ = ["TRACES", "SymmetricTrainer"]

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


class SymmetricTrainer(NPE_C):
    """sbi's trainer with the symmetric stage behind its own loop.

    Resuming continues where training stopped, on the same random stream: with a symmetric stage
    under way, that stage; without one (`num_steps=0`, or a proxy that is not trusted), sbi's loop.
    """

    options: JeffreysOptions

    def _start_anew(self) -> None:
        """Forget the proxy and the symmetric stage of an earlier training."""
        self._proxy: Proxy | None = None
        self._stage: SymmetricStage | None = None
        self._rng_state: Tensor | None = None
        #: Weights of the last step, where the best ones were put into the main meanwhile.
        self._paused_state: dict[str, Any] | None = None
        self._stage_epochs = 0
        self._plain_steps = 0  # that stage 0 took

    def _run_training_loop(
        self,
        train_loader: DataLoader,
        val_loader: DataLoader,
        train_config: TrainConfig,
        loss_args: LossArgs | None = None,
        summarization_kwargs: dict[str, Any] | None = None,
    ) -> ConditionalDensityEstimator:
        """Stage 0 is sbi's own loop; the proxy and the symmetric stage follow it."""
        assert isinstance(loss_args, LossArgsNPE)
        if not train_config.resume_training:
            self._start_anew()
        with self._own_randomness():
            try:
                epochs = 0
                if self._stage is None:
                    super()._run_training_loop(
                        train_loader, val_loader, train_config, loss_args, summarization_kwargs
                    )
                    epochs = self._summary["epochs_trained"].pop()
                    self._summary["best_validation_loss"].pop()
                    self._plain_steps += epochs * len(train_loader)
                epochs += self._train_symmetric(train_loader, train_config, loss_args)
            except KeyboardInterrupt:
                self._pause()
                raise
        self._neural_net.zero_grad(set_to_none=True)
        self._summary["epochs_trained"].append(epochs)
        self._summary["best_validation_loss"].append(self._best_val_loss)
        self._log_round()
        if train_config.show_train_summary:
            print(self._describe_round(self._round, self._summary))
        return self._neural_net

    def _summarize(self, round_: int) -> None:
        """sbi calls this at the end of its loop; the round is logged after the symmetric stage."""

    def _log_round(self) -> None:
        """Log sbi's metrics and ours to the tracker."""
        first = len(self._summary["trust"]) - self._stage_epochs
        super()._summarize(self._round)
        for name in TRACES:
            for step, value in enumerate(self._summary[name][first:], start=first):
                self._tracker.log_metric(name=name, value=value, step=step)
        self._tracker.flush()

    def _report_convergence_at_end(self, epoch: int, max_num_epochs: int) -> None:
        """sbi's report, silent where progress was asked to be."""
        if self._show_progress_bars or epoch > max_num_epochs:
            super()._report_convergence_at_end(epoch, max_num_epochs)

    # ------------------------------------------------------------------ the symmetric objective

    def _train_symmetric(
        self, train_loader: DataLoader, config: TrainConfig, loss_args: LossArgsNPE
    ) -> int:
        """Fit the proxy, weigh it, and run what is left of the symmetric stage; epochs run."""
        self._stage_epochs = 0
        if self.options.num_steps == 0:
            return 0
        theta, x = (t.to(self._device) for t in train_loader.dataset.tensors[:2])  # type: ignore[attr-defined]
        held_out = self._held_out(theta, x, loss_args)
        if self._stage is None:
            self._prepare_stage(theta, x, held_out, config, loss_args)
        stage, proxy = self._stage, self._proxy
        if stage is None or proxy is None:
            return 0
        if self._paused_state is not None:
            self._neural_net.load_state_dict(self._paused_state)
            self._paused_state = None
        epochs_left = -(-(stage.num_steps - stage.step) // stage.options.steps_per_epoch)
        bar = tqdm(
            range(min(epochs_left, config.max_num_epochs)),
            desc="Symmetric stage",
            disable=not self._show_progress_bars,
        )
        for _ in bar:
            start = time.time()
            terms = stage.run_epoch(self._real_batches(train_loader, loss_args, held_out.atomic))
            value = held_out.main(self._neural_net, proxy)
            self._keep(stage, value)
            self._record(stage, terms, value, held_out.reverse(self._neural_net, proxy), start)
            stage.update_multipliers(value)
            self._stage_epochs += 1
            self._save_randomness()
            bar.set_postfix(held_out=f"{value:.3f}", best=f"{self._best_val_loss:.3f}")
        self._pause()
        if not stage.finished:
            warnings.warn(
                f"max_num_epochs={config.max_num_epochs} ended the symmetric stage after "
                f"{stage.step} of {stage.num_steps} steps; the best weights so far are "
                "kept. Continue with train(resume_training=True).",
                stacklevel=2,
            )
        return self._stage_epochs

    def _prepare_stage(
        self,
        theta: Tensor,
        x: Tensor,
        held_out: HeldOut,
        config: TrainConfig,
        loss_args: LossArgsNPE,
    ) -> None:
        """Fit the proxy and set up the symmetric stage, or leave stage 0 as it is."""
        num_steps = self.options.steps_for(len(theta), self._plain_steps)
        train, val = self.train_indices.to(self._device), self.val_indices.to(self._device)
        prepared = prepare(
            self._prior,
            self._neural_net,
            Simulations(theta, x, train, val, self._round),
            held_out,
            self.options,
            num_steps,
            config.max_num_epochs,
            config.stop_after_epochs,
            self._show_progress_bars,
        )
        self._proxy = prepared.proxy
        self._summary["proxy"].append(prepared.note)
        self._summary["proxy_held_out"].append(prepared.proxy_nll)
        if prepared.proxy is None:
            warnings.warn(f"NPE_Jeffreys falls back to plain NPE: {prepared.note}", stacklevel=2)
        if not prepared.usable or not self._kernel_leaves_draws(prepared, loss_args):
            return
        assert prepared.proxy is not None
        assert prepared.pool is not None
        self._best_val_loss = prepared.main_nll  # in later rounds, in the atomic reading
        self._best_model_state_dict = deepcopy(self._neural_net.state_dict())
        hand_back_embedding(prepared.proxy, self._neural_net)
        self._stage = SymmetricStage(
            self._neural_net,
            prepared.proxy,
            self.options,
            config.learning_rate,
            config.clip_max_norm,
            prepared.pool,
            loss_args.calibration_kernel,
            entropy=min(prepared.proxy_nll, prepared.main_nll),
            npe_nll=prepared.main_nll,
            proxy_trust=prepared.trust,
            num_steps=num_steps,
            pool_weights=prepared.pool_weights,
        )

    def _kernel_leaves_draws(self, prepared: Prepared, loss_args: LossArgsNPE) -> bool:
        """Whether the calibration kernel is positive at any observation of the pool."""
        kernel = loss_args.calibration_kernel
        assert kernel is not None
        assert prepared.pool is not None
        if bool(kernel(prepared.pool[1]).sum() > 0):
            return True
        reason = "calibration_kernel is zero at every observation drawn for the symmetric stage"
        self._summary["proxy"][-1] += f"; {reason}, plain NPE kept"
        warnings.warn(f"NPE_Jeffreys falls back to plain NPE: {reason}; widen it.", stacklevel=2)
        return False

    def _held_out(self, theta: Tensor, x: Tensor, loss_args: LossArgsNPE) -> HeldOut:
        """The held-out pairs, read as the round's loss demands."""
        kernel = loss_args.calibration_kernel
        assert kernel is not None
        x_val = x[self.val_indices]
        atomic = self._round > 0 and not loss_args.force_first_round_loss
        return HeldOut(theta[self.val_indices], x_val, kernel(x_val), atomic)

    def _real_batches(
        self, loader: DataLoader, loss_args: LossArgsNPE, atomic: bool
    ) -> Callable[[], RealBatch]:
        """Successive training batches, starting over at the end; in later rounds sbi's losses."""
        kernel = loss_args.calibration_kernel
        assert kernel is not None

        def batches() -> Iterator[Any]:
            while True:
                yield from loader

        stream = batches()

        def pairs() -> RealBatch:
            theta, x = (t.to(self._device) for t in next(stream)[:2])
            return theta, x, kernel(x)

        return (lambda: self._get_losses(next(stream), loss_args)) if atomic else pairs

    # ------------------------------------------------------------------ state

    def _keep(self, stage: SymmetricStage, value: float) -> None:
        """Snapshot the main under sbi's own predicate; at the end, prefer the annealed weights.

        The minimum over an epoch-by-epoch trace of a hundred held-out pairs is a lucky epoch as
        often as a good one. All iterates within the tolerance satisfy the constraint, and of those
        the last one has the smallest R: it is kept, unless it falls behind plain NPE.
        """
        self._val_loss = value
        bound = min(self._best_val_loss + self.options.tolerance, stage.npe_nll)
        if value < self._best_val_loss or (stage.finished and value <= bound):
            self._best_val_loss = value
            self._best_model_state_dict = deepcopy(self._neural_net.state_dict())

    def _pause(self) -> None:
        """Load the best held-out weights seen so far, and keep the last ones for resuming."""
        if self._stage is not None and not self._stage.finished:
            self._paused_state = deepcopy(self._neural_net.state_dict())
        if self._neural_net is not None and self._best_model_state_dict is not None:
            self._neural_net.load_state_dict(self._best_model_state_dict)
            self._neural_net.eval()

    def _record(
        self,
        stage: SymmetricStage,
        terms: dict[str, float],
        value: float,
        reverse: float,
        start: float,
    ) -> None:
        """Append one epoch to the summary: sbi's keys keep their meaning, ours stand beside."""
        values = (
            terms["forward"],
            terms["generated"],
            terms["reverse"],
            value,
            reverse,
            stage.entropy,
            float(stage.multipliers.multipliers[0]),
            float(stage.multipliers.slack[0]),
            stage.trust,
        )
        for name, entry in zip(TRACES, values):
            self._summary[name].append(entry)
        self._summarize_epoch(terms["forward"], value, start, {})

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Train on a random stream of our own, kept with the trainer so that resuming continues it.

        The stream starts from the global generator, so `torch.manual_seed` governs it, and the
        global generator is left one draw further, however long training was.
        """
        if self._rng_state is None:
            seed = int(torch.randint(2**31, (1,)))
            state = torch.Generator().manual_seed(seed).get_state()
        else:
            state = self._rng_state
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state.cpu())  # loading onto a device moved it there
            yield
            self._save_randomness()

    def _save_randomness(self) -> None:
        self._rng_state = torch.get_rng_state()

"""One training: plain NPE, the proxy, the symmetric stage, and the report."""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sbi_jeffreys import _sbi
from sbi_jeffreys._checks import JeffreysWarning
from sbi_jeffreys._sbi import NPE, ConditionalDensityEstimator
from sbi_jeffreys.options import JeffreysOptions
from sbi_jeffreys.proxies import Proxy, hand_back_embedding
from sbi_jeffreys.training.arguments import TrainArguments, check_resumable, lost_builder
from sbi_jeffreys.training.conclusion import complete_summary, make_report
from sbi_jeffreys.training.held_out import HeldOut
from sbi_jeffreys.training.loss import RealBatch, SymmetricLoss
from sbi_jeffreys.training.preparation import Budget, Prepared, Simulations, prepare
from sbi_jeffreys.training.randomness import RandomStream
from sbi_jeffreys.training.report import Kept, ProxyStatus, TrainingReport
from sbi_jeffreys.training.stage import SymmetricStage
from sbi_jeffreys.training.symmetric import Best, SymmetricTraining

__all__ = ["Training"]


class Training:
    """What is remembered of a training beside the network; picklable at any moment.

    Attributes:
        prepared: The proxy and what was found out about it; None before it was fitted.
        symmetric: The symmetric stage, where there is one.
        report: The outcome of the last call of `train`.
        starting_round: Of the simulations in use, as sbi asked its data loaders for them.
        available: How many simulations there were when the training began; None before it.
        plain_steps: Gradient steps that plain NPE took.
        seconds: Wall time of plain NPE, of the proxy, and of the symmetric stage.
        arguments: Of the call of `train` under way, None between calls.
        written: When the last checkpoint was written, by the monotonic clock.
    """

    def __init__(self) -> None:
        self.stream = RandomStream()
        self.starting_round = 0
        self.available: int | None = None
        self.report: TrainingReport | None = None
        self.written = 0.0
        self.arguments: TrainArguments | None = None
        self._forget()

    def _forget(self) -> None:
        """Forget the proxy and the symmetric stage of an earlier training."""
        self.prepared: Prepared | None = None
        self.symmetric: SymmetricTraining | None = None
        self.plain_steps = 0
        self.seconds = [0.0, 0.0, 0.0]

    @property
    def proxy(self) -> Proxy | None:
        """The fitted proxy, if there is one."""
        return None if self.prepared is None else self.prepared.proxy

    @property
    def stage(self) -> SymmetricStage | None:
        """The symmetric stage, if there is one."""
        return None if self.symmetric is None else self.symmetric.stage

    def check_resumable(
        self, trainer: NPE, options: JeffreysOptions, arguments: TrainArguments, builder: Any
    ) -> None:
        """Refuse what contradicts what was trained before; see `arguments.check_resumable`."""
        trained = hasattr(trainer, "train_indices")
        if builder is None and (arguments.retrain_from_scratch or not trained):
            raise lost_builder()
        if arguments.resume_training:
            available = len(trainer.get_simulations()[0]) if trained else 0
            check_resumable(
                self.available if trained else None,
                available,
                options,
                None if self.stage is None else self.stage.options,
            )

    def check_trainable(self, trainer: NPE, starting_round: int) -> None:
        """Check the simulations that a call of `train` is about to use; else nothing."""
        if self.arguments is not None:
            self.arguments.check_trainable(*trainer.get_simulations(starting_round)[:2])

    def run(
        self,
        trainer: NPE,
        train_plain: Callable[..., ConditionalDensityEstimator],
        options: JeffreysOptions,
        arguments: TrainArguments,
        show_progress_bars: bool,
    ) -> ConditionalDensityEstimator:
        """Train, on a random stream of our own; whatever ends it, the best weights are left.

        Args:
            trainer: The trainer, with its simulations.
            train_plain: sbi's `train`.
            options: Of the symmetric objective.
            arguments: Of `train`.
            show_progress_bars: Whether to show progress and to print the report.
        """
        gradients, epochs = torch.is_grad_enabled(), 0
        self.arguments = arguments
        plain = not (arguments.resume_training and self.symmetric is not None)
        if not arguments.resume_training:
            self.stream.start_anew()
        try:
            with self.stream.active():
                if plain:
                    self._train_plain(trainer, train_plain, arguments, show_progress_bars)
                    self._checkpoint(trainer, options)
                if options.num_steps != 0:
                    epochs = self._train_symmetric(trainer, options, arguments, show_progress_bars)
        finally:
            self.arguments = None  # a kernel may not be picklable
            torch.set_grad_enabled(gradients)  # an interrupt inside no_grad() leaves them off
        main = _sbi.network_of(trainer)
        assert main is not None
        main.zero_grad(set_to_none=True)
        main.eval()
        if self.symmetric is not None:
            complete_summary(trainer, epochs, plain, self.symmetric.best.value)
        self._conclude(trainer, arguments, show_progress_bars)
        return main

    def _checkpoint(self, trainer: NPE, options: JeffreysOptions) -> None:
        """Write the trainer to the path that the options name, if they name one."""
        if options.checkpoint is not None:
            self.stream.mark()
            self.written = time.monotonic()
            arguments, self.arguments = self.arguments, None
            trainer.save(options.checkpoint)  # type: ignore[attr-defined]  # NPE_Jeffreys has it
            self.arguments = arguments

    def _train_plain(
        self,
        trainer: NPE,
        train_plain: Callable[..., ConditionalDensityEstimator],
        arguments: TrainArguments,
        show_progress_bars: bool,
    ) -> None:
        """Stage 0. An exception leaves the best weights so far in the network."""
        if not arguments.resume_training:
            self._forget()
            self.available = None
        epochs_before = len(trainer.summary["training_loss"])
        silence = nullcontext() if show_progress_bars else redirect_stdout(io.StringIO())
        keywords = arguments.for_sbi() | {"show_train_summary": False}
        try:
            with silence, self._timed(0):
                train_plain(**keywords)
        except BaseException:
            _sbi.restore_best_weights(trainer)
            raise
        epochs = len(trainer.summary["training_loss"]) - epochs_before
        # mutant: steps-whatever-npe-took
        self.plain_steps += epochs * len(self._loader(trainer, arguments))

    def _train_symmetric(
        self,
        trainer: NPE,
        options: JeffreysOptions,
        arguments: TrainArguments,
        show_progress_bars: bool,
    ) -> int:
        """Fit the proxy if there is none yet, and run the rest of the stage; epochs run."""
        device = _sbi.device_of(trainer)
        theta, x = (t.to(device) for t in trainer.get_simulations(self.starting_round)[:2])
        atomic = _sbi.latest_round(trainer) > 0 and not arguments.force_first_round_loss
        val = trainer.val_indices
        held_out = HeldOut(theta[val], x[val], arguments.kernel(x[val]), atomic)
        if self.symmetric is None:
            with self._timed(1):
                self._prepare(trainer, theta, x, held_out, options, arguments, show_progress_bars)
            self._checkpoint(trainer, options)
        if self.symmetric is None:
            return 0
        summary = trainer.summary

        def on_epoch(traces: dict[str, float], training_loss: float, seconds: float) -> None:
            for name, value in traces.items():
                summary[name].append(value)
            summary["training_loss"].append(training_loss)
            summary["validation_loss"].append(traces["held_out_forward"])
            summary["epoch_durations_sec"].append(seconds)

        batches, symmetric = self._real_batches(trainer, arguments, atomic), self.symmetric

        def checkpoint_if_due() -> None:
            due = time.monotonic() - self.written > options.checkpoint_seconds
            if options.checkpoint is not None and due:
                symmetric.pause()
                self._checkpoint(trainer, options)
                symmetric.resume()

        with self._timed(2):
            epochs = symmetric.run(
                held_out,
                batches,
                arguments.max_num_epochs,
                on_epoch,
                checkpoint_if_due,
                show_progress_bars,
            )
            with torch.random.fork_rng(devices=[]):  # a pause must not shift the stream
                symmetric.evaluate(held_out)
            return epochs

    def _prepare(
        self,
        trainer: NPE,
        theta: Tensor,
        x: Tensor,
        held_out: HeldOut,
        options: JeffreysOptions,
        arguments: TrainArguments,
        show_progress_bars: bool,
    ) -> None:
        """Fit the proxy and set up the symmetric stage, or leave plain NPE as it is."""
        main = _sbi.network_of(trainer)
        assert main is not None
        # mutant: steps-of-the-default-alone
        num_steps = options.steps_for(len(theta), self.plain_steps)
        indices = trainer.train_indices.to(theta.device), trainer.val_indices.to(theta.device)
        found = self.prepared = prepare(
            _sbi.prior_of(trainer),
            main,
            Simulations(theta, x, *indices, _sbi.latest_round(trainer)),
            held_out,
            arguments.kernel,
            options,
            Budget(
                num_steps, arguments.max_num_epochs, arguments.stop_after_epochs, show_progress_bars
            ),
        )
        trainer.summary["proxy"].append(found.note)
        trainer.summary["proxy_held_out"].append(found.proxy_value)
        if found.status is not ProxyStatus.USED:
            return
        assert found.proxy is not None
        assert found.pool is not None
        assert found.main_losses is not None
        weights = deepcopy(main.state_dict())
        best = Best(found.main_value, found.main_losses, weights, Kept.PLAIN_NPE)
        hand_back_embedding(found.proxy, main)
        stage = SymmetricStage(
            SymmetricLoss(main, found.proxy, found.pool, options, found.trust),
            options,
            arguments.learning_rate,
            arguments.clip_max_norm,
            entropy=min(found.proxy_value, found.main_value),
            npe_nll=found.main_value,
            num_steps=num_steps,
        )
        self.symmetric = SymmetricTraining(stage, best, found.main_losses, found.proxy_losses)
        if not held_out.atomic:
            main.eval()
            self.symmetric.coverage_before = held_out.coverage(main, found.proxy.prior)

    def _loader(self, trainer: NPE, arguments: TrainArguments) -> DataLoader:
        """sbi's loader of the training simulations that plain NPE was trained on."""
        return trainer.get_dataloaders(
            self.starting_round,
            arguments.training_batch_size,
            arguments.validation_fraction,
            resume_training=True,
            dataloader_kwargs=arguments.dataloader_kwargs,
        )[0]

    def _real_batches(
        self, trainer: NPE, arguments: TrainArguments, atomic: bool
    ) -> Callable[[], RealBatch]:
        """Successive training batches, starting over at the end; in later rounds sbi's losses."""
        loader, device = self._loader(trainer, arguments), _sbi.device_of(trainer)

        def endless() -> Iterator[Any]:
            while True:
                yield from loader

        stream = endless()

        def pairs() -> RealBatch:
            theta, x = (t.to(device) for t in next(stream)[:2])
            return theta, x, arguments.kernel(x)

        def atomic_losses() -> RealBatch:
            force = arguments.force_first_round_loss
            return _sbi.losses(trainer, next(stream), arguments.kernel, force)

        return atomic_losses if atomic else pairs

    @contextmanager
    def _timed(self, part: int) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start

    def _conclude(self, trainer: NPE, arguments: TrainArguments, show_progress_bars: bool) -> None:
        """Make the report, print it, and warn of what is not as the method promises."""
        self.report = make_report(self.prepared, self.symmetric, self.seconds)
        if arguments.show_train_summary:
            print(_sbi.describe_round(trainer))
        if show_progress_bars or arguments.show_train_summary:
            print(f"\n{self.report}")
        for problem in self.report.problems:
            warnings.warn(self.report.describe(problem), JeffreysWarning, stacklevel=4)

"""One training: plain NPE, the proxy, the symmetric stage, and the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sbi_jeffreys import _sbi
from sbi_jeffreys._sbi import NPE, ConditionalDensityEstimator
from sbi_jeffreys.options import JeffreysOptions
from sbi_jeffreys.proxies import Proxy
from sbi_jeffreys.training import data
from sbi_jeffreys.training.arguments import TrainArguments, check_resumable, lost_builder
from sbi_jeffreys.training.before import Before
from sbi_jeffreys.training.conclusion import announce, complete_summary, make_report
from sbi_jeffreys.training.held_out import HeldOut
from sbi_jeffreys.training.own_space import KeptPlain, choose_space
from sbi_jeffreys.training.preparation import (
    Budget,
    Prepared,
    begin_stage,
    prepare,
)
from sbi_jeffreys.training.randomness import RandomStream
from sbi_jeffreys.training.report import ProxyStatus, Space, TrainingReport
from sbi_jeffreys.training.stage import SymmetricStage
from sbi_jeffreys.training.symmetric import SymmetricTraining
from sbi_jeffreys.training.unfinished import UnfinishedPlain, goes_on

__all__ = ["Training"]


class Training:
    """What is remembered of a training beside the network; picklable at any moment.

    Attributes:
        prepared: The proxy and what was found out about it; None before it was fitted.
        symmetric: The symmetric stage, where there is one.
        report: The outcome of the last call of `train`; None until a training has ended.
        starting_round: First round of the simulations in use, as passed to `get_dataloaders`.
        available: How many simulations there were when the training began; None before that.
        lasting: Arguments of `train` that must be the same on resuming.
        plain_steps: Gradient steps that plain NPE took.
        seconds: Wall time of plain NPE, of the proxy, and of the symmetric stage.
        arguments: Arguments of the call of `train` under way; None between calls.
        unfinished: Plain NPE, where `max_num_epochs` stopped it before the symmetric stage.
        set_aside: The main in the prior's space, while one in θ's own space is the trainer's.
        written: When the last checkpoint was written, by the monotonic clock.
        position: Where in an epoch of training batches the symmetric stage is.
    """

    def __init__(self) -> None:
        self.stream = RandomStream()
        self.starting_round = 0
        self.available: int | None = None
        self.written = 0.0
        self.arguments: TrainArguments | None = None
        self.set_aside: ConditionalDensityEstimator | None = None
        self._forget()

    def _forget(self) -> None:
        """Forget the proxy, the symmetric stage and the report of an earlier training."""
        # mutant: report-of-an-earlier-training
        self.report: TrainingReport | None = None
        self.prepared: Prepared | None = None
        self.symmetric: SymmetricTraining | None = None
        self.position = data.Position()
        self.unfinished: UnfinishedPlain | None = None
        self.lasting: dict[str, bool] | None = None
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
                arguments,
                self.lasting,
            )

    def check_trainable(self, trainer: NPE, starting_round: int) -> None:
        """Check the simulations that a call of `train` is about to use; nothing between calls."""
        if self.arguments is not None:
            self.arguments.check_trainable(*trainer.get_simulations(starting_round)[:2])

    def put_back(self, trainer: NPE) -> None:
        """Before training goes on, give the trainer back the main that was set aside, if one was.

        sbi's optimiser has the parameters of that main, from which no mass leaks in later rounds.
        """
        if self.arguments is not None and self.set_aside is not None:
            _sbi.set_network(trainer, self.set_aside)  # mutant: own-space-trained-further
            self.set_aside = None
            self.report = None  # mutant: report-of-the-other-network

    def run(
        self,
        trainer: NPE,
        train_plain: Callable[..., ConditionalDensityEstimator],
        options: JeffreysOptions,
        arguments: TrainArguments,
        builder: Any,
        show_progress_bars: bool,
    ) -> ConditionalDensityEstimator:
        """Train on a random stream of its own; however training ends, the best weights are left.

        Args:
            trainer: The trainer, with its simulations.
            train_plain: sbi's `train`.
            options: Options of the symmetric objective.
            arguments: Arguments of `train`.
            builder: Builder of the main.
            show_progress_bars: Whether to show progress and to print the report.
        """
        gradients, epochs = torch.is_grad_enabled(), 0
        before = Before(trainer, self)
        self.arguments = arguments
        if unfinished := goes_on(trainer, self.unfinished, self.symmetric, arguments):
            self.stream = self.stream.at(unfinished.random_state)
            self.prepared = self.symmetric = self.report = self.set_aside = None
            self.position, before.swapped = data.Position(), True
        plain = not (arguments.resume_training and self.symmetric is not None)
        if not arguments.resume_training:
            self.stream = RandomStream()
        try:
            with self.stream.active():
                if plain:
                    self._train_plain(trainer, train_plain, arguments, before, show_progress_bars)
                    self._checkpoint(trainer, options)
                if options.num_steps != 0:
                    epochs = self._train_symmetric(trainer, options, arguments, show_progress_bars)
            kept = self._keep_plain(trainer, arguments, builder, show_progress_bars)
        finally:
            self.arguments = None  # a kernel may not be picklable
            torch.set_grad_enabled(gradients)  # an interrupt inside no_grad() leaves them off
        main = _sbi.network_of(trainer)
        assert main is not None
        main.zero_grad(set_to_none=True)
        main.eval()
        if self.symmetric is not None:
            complete_summary(trainer, epochs, plain, self.symmetric.best.value)
        self.report = make_report(self.prepared, self.symmetric, self.seconds, kept)
        announce(self.report, trainer, arguments.show_train_summary, show_progress_bars)
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
        before: Before,
        show_progress_bars: bool,
    ) -> None:
        """Train plain NPE. An exception leaves the best weights so far in the network.

        An exception before the first epoch, as where sbi or a check of this package refuses the
        call, leaves everything as it was: an earlier training can still be resumed.
        """
        if not arguments.resume_training:
            self._forget()
            self.available, self.lasting = None, arguments.lasting
        epochs_before = len(trainer.summary["training_loss"])
        keywords = arguments.for_sbi() | {"show_train_summary": False}
        try:
            with _sbi.silent_unless(show_progress_bars), self._timed(0):
                train_plain(**keywords)
        except BaseException:
            # mutant: plain-npe-after-a-refusal
            if (arguments.resume_training and not before.swapped) or before.over:
                _sbi.restore_best_weights(trainer)
            else:
                before.put_back()  # mutant: refused-call-forgets
            raise
        epochs = len(trainer.summary["training_loss"]) - epochs_before
        loader = data.training_loader(trainer, self.starting_round, arguments)
        # mutant: steps-whatever-npe-took
        self.plain_steps += epochs * len(loader)
        self.unfinished = UnfinishedPlain.of(trainer, arguments.max_num_epochs)

    def _train_symmetric(
        self,
        trainer: NPE,
        options: JeffreysOptions,
        arguments: TrainArguments,
        show_progress_bars: bool,
    ) -> int:
        """Fit the proxy if there is none yet, run the rest of the stage, and return its epochs."""
        # mutant: refused-call-swaps-the-main
        held_out = data.held_out_pairs(trainer, self.starting_round, arguments)
        # This calls `get_dataloaders`, which also gives back the main that was set aside.
        batches = data.real_batches(
            trainer, self.starting_round, arguments, held_out.atomic, self.position
        )
        if self.symmetric is None:
            with self._timed(1):
                self._prepare(trainer, held_out, options, arguments, show_progress_bars)
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

        symmetric = self.symmetric

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
                before = None if self.prepared is None else self.prepared.proxy_losses
                # mutant: losses-of-the-proxy-grow-with-every-pause
                symmetric.evaluate(held_out, before)
            return epochs

    def _prepare(
        self,
        trainer: NPE,
        held_out: HeldOut,
        options: JeffreysOptions,
        arguments: TrainArguments,
        show_progress_bars: bool,
    ) -> None:
        """Fit the proxy and set up the symmetric stage, or leave plain NPE as it is."""
        main = _sbi.network_of(trainer)
        assert main is not None
        simulations = data.simulations_for_proxy(trainer, self.starting_round)
        # mutant: steps-of-the-default-alone
        num_steps = options.steps_for(simulations.in_use, self.plain_steps)
        budget = Budget(
            num_steps, arguments.max_num_epochs, arguments.stop_after_epochs, show_progress_bars
        )
        found = self.prepared = prepare(
            _sbi.prior_of(trainer),
            main,
            simulations,
            held_out,
            arguments.kernel,
            options,
            budget,
        )
        trainer.summary["proxy"].append(found.note)
        trainer.summary["proxy_held_out"].append(found.proxy_value)
        if found.status is ProxyStatus.USED:
            self.symmetric = begin_stage(found, main, held_out, options, arguments, budget)

    def _keep_plain(
        self, trainer: NPE, arguments: TrainArguments, builder: Any, show_progress_bars: bool
    ) -> KeptPlain | None:
        """Where plain NPE is the result, keep it with θ in the space that suits it better.

        The second training draws from a random stream of its own, so that a training that is
        resumed goes on as if there had been no pause.
        """
        if self.symmetric is not None and not self.symmetric.ended_with_plain:
            return None
        with self._timed(0), self.stream.from_start().active():
            kept = choose_space(trainer, builder, arguments, show_progress_bars)
        if kept is not None and kept.choice.kept is Space.OWN:
            self.set_aside = _sbi.network_of(trainer)
            _sbi.set_network(trainer, kept.network)
        return kept

    @contextmanager
    def _timed(self, part: int) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start

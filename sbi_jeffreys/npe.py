r"""`NPE_Jeffreys`: neural posterior estimation with the symmetric Jeffreys divergence.

NPE minimises the forward term F = E_π[−log p_φ(θ|x)] alone, and on few simulations maximum
likelihood overfits: the posterior is wrong and too narrow. The Jeffreys divergence KL(π‖p_φ) +
KL(p_φ‖π) adds the reverse direction, for which a proxy q_ψ(θ|x) ∝ p(θ) e^{f_ψ(θ,x)} stands in for
the unknown π (Ben-Dov & Chamon, arXiv 2511.11159). Training has three parts:

    0. plain NPE with its early stopping: the first main, and the held-out value to beat;
    1. the proxy, fitted to the same simulations, and how far it can be trusted;
    2. the symmetric stage: main and proxy against each other under multipliers that adapt.

The weights returned are the best ever seen on the held-out simulations, stage 0 included.
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
from torch.distributions import Distribution
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from sbi_jeffreys._sbi import (
    NPE_C,
    ConditionalDensityEstimator,
    ConditionalEstimatorBuilder,
    LossArgs,
    LossArgsNPE,
    Tracker,
    TrainConfig,
)
from sbi_jeffreys.correction import CorrectedPosterior
from sbi_jeffreys.estimators import NamedBuilder
from sbi_jeffreys.held_out import HeldOut
from sbi_jeffreys.options import JeffreysOptions
from sbi_jeffreys.preparation import Simulations, prepare
from sbi_jeffreys.proxies import Proxy, hand_back_embedding
from sbi_jeffreys.symmetric import RealBatch, SymmetricStage

__all__ = ["NPE_Jeffreys"]

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


class NPE_Jeffreys(NPE_C):
    r"""Neural posterior estimation with the Jeffreys divergence: a drop-in for `sbi.inference.NPE`.

    Args:
        prior: Prior distribution, as sbi takes it. None: the empirical prior of the simulations.
        density_estimator: The main model p_φ(θ|x): a name or builder of sbi's. A name is built in
            transformed spaces (`JeffreysOptions.marginal_transforms`), a builder as it comes.
        device: Training device.
        logging_level: As in sbi.
        summary_writer: Deprecated by sbi; use `tracker`.
        tracker: Where traces are logged; TensorBoard by default, as in sbi.
        show_progress_bars: Whether training shows progress.
        options: Everything about the symmetric objective.

    Raises:
        TypeError: If `options` is not a `JeffreysOptions`.

    Example:
        >>> import torch
        >>> from sbi.utils import BoxUniform
        >>> from sbi_jeffreys import JeffreysOptions, NPE_Jeffreys
        >>> _ = torch.manual_seed(0)
        >>> prior = BoxUniform(-torch.ones(2), torch.ones(2))
        >>> theta = prior.sample((200,))
        >>> x = theta + 0.1 * torch.randn_like(theta)
        >>> inference = NPE_Jeffreys(
        ...     prior, show_progress_bars=False, options=JeffreysOptions(num_steps=50)
        ... )
        >>> _ = inference.append_simulations(theta, x).train(max_num_epochs=20)
        >>> inference.build_posterior().sample((100,), x=x[0], show_progress_bars=False).shape
        torch.Size([100, 2])
    """

    def __init__(
        self,
        prior: Distribution | None = None,
        density_estimator: str | ConditionalEstimatorBuilder[ConditionalDensityEstimator] = "nsf",
        device: str = "cpu",
        logging_level: int | str = "WARNING",
        summary_writer: Any | None = None,
        tracker: Tracker | None = None,
        show_progress_bars: bool = True,
        options: JeffreysOptions | None = None,
    ) -> None:
        if options is not None and not isinstance(options, JeffreysOptions):
            raise TypeError(
                f"options must be a JeffreysOptions or None, got {type(options).__name__}; "
                "write options=JeffreysOptions(num_steps=…, …)."
            )
        super().__init__(
            prior=prior,
            density_estimator=density_estimator,  # type: ignore[arg-type]
            device=device,
            logging_level=logging_level,
            summary_writer=summary_writer,
            tracker=tracker,
            show_progress_bars=show_progress_bars,
        )
        self.options = JeffreysOptions() if options is None else options
        if isinstance(density_estimator, str) and self.options.marginal_transforms:
            self._build_neural_net = NamedBuilder(density_estimator, prior)
        self._proxy: Proxy | None = None
        self._stage: SymmetricStage | None = None
        self._stage0_done = False
        self._rng_state: Tensor | None = None
        self._summary.update({name: [] for name in (*TRACES, "proxy", "proxy_held_out")})

    @property
    def proxy(self) -> Proxy | None:
        """The fitted proxy q_ψ of the last training, or None before it."""
        return self._proxy

    def build_corrected_posterior(
        self, num_candidates: int = 20_000, device: str | None = None
    ) -> CorrectedPosterior:
        """The main's posterior with its draws resampled by the proxy's importance weights.

        Not the default: it is as good as the proxy at the observation, which the effective sample
        size (`CorrectedPosterior.effective_sample_size`) and `summary["proxy_held_out"]` tell.

        Args:
            num_candidates: Draws of the main that are weighted per observation.
            device: Device of the posterior; the trainer's if None.

        Raises:
            RuntimeError: If there is no proxy: not trained yet, or none for this x.
        """
        if self._neural_net is None or self._proxy is None:
            raise RuntimeError(
                "There is no proxy to correct with. Call train() first; if it warned that it fell "
                "back to plain NPE, use build_posterior() instead."
            )
        return CorrectedPosterior(
            deepcopy(self._neural_net),
            deepcopy(self._proxy),
            self._prior,
            num_candidates,
            device=device or self._device,
        )

    # ------------------------------------------------------------------ sbi's hooks

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
            self._proxy, self._stage, self._stage0_done, self._rng_state = None, None, False, None
        with self._own_randomness():
            try:
                epochs = 0
                if not self._stage0_done:
                    super()._run_training_loop(
                        train_loader, val_loader, train_config, loss_args, summarization_kwargs
                    )
                    self._stage0_done = True
                    epochs = self._summary["epochs_trained"].pop()
                    self._summary["best_validation_loss"].pop()
                epochs += self._train_symmetric(train_loader, train_config, loss_args)
            except KeyboardInterrupt:
                self._restore_best()
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
        epochs_left = -(-(self.options.num_steps - stage.step) // self.options.steps_per_epoch)
        bar = tqdm(
            range(min(epochs_left, config.max_num_epochs)),
            desc="Symmetric stage",
            disable=not self._show_progress_bars,
        )
        for _ in bar:
            start = time.time()
            terms = stage.run_epoch(self._real_batches(train_loader, loss_args, held_out.atomic))
            value = held_out.main(self._neural_net, proxy)
            self._keep_if_best(value)
            self._record(stage, terms, value, held_out.reverse(self._neural_net, proxy), start)
            stage.update_multipliers(value)
            self._stage_epochs += 1
            self._save_randomness()
            bar.set_postfix(held_out=f"{value:.3f}", best=f"{self._best_val_loss:.3f}")
        self._restore_best()
        if not stage.finished:
            warnings.warn(
                f"max_num_epochs={config.max_num_epochs} ended the symmetric stage after "
                f"{stage.step} of {self.options.num_steps} steps; the best weights so far are "
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
        train, val = self.train_indices.to(self._device), self.val_indices.to(self._device)
        prepared = prepare(
            self._prior,
            self._neural_net,
            Simulations(theta, x, train, val, self._round),
            held_out,
            self.options,
            config.max_num_epochs,
            config.stop_after_epochs,
            self._show_progress_bars,
        )
        self._proxy = prepared.proxy
        self._summary["proxy"].append(prepared.note)
        self._summary["proxy_held_out"].append(prepared.proxy_nll)
        if prepared.proxy is None:
            warnings.warn(f"NPE_Jeffreys falls back to plain NPE: {prepared.note}", stacklevel=2)
        if not prepared.usable:
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
            proxy_trust=prepared.trust,
        )

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

    def _keep_if_best(self, value: float) -> None:
        """Snapshot the main under sbi's own predicate."""
        self._val_loss = value
        if value < self._best_val_loss:
            self._best_val_loss = value
            self._best_model_state_dict = deepcopy(self._neural_net.state_dict())

    def _restore_best(self) -> None:
        """Load the best held-out weights seen so far, if any."""
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
            torch.set_rng_state(state)
            yield
            self._save_randomness()

    def _save_randomness(self) -> None:
        self._rng_state = torch.get_rng_state()

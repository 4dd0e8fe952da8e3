r"""`NPE_Jeffreys`: neural posterior estimation with the symmetric Jeffreys divergence.

NPE minimises the forward term F = E_π[−log p_φ(θ|x)] alone, and on few simulations maximum
likelihood overfits: the posterior is wrong and too narrow. The Jeffreys divergence KL(π‖p_φ) +
KL(p_φ‖π) adds the reverse direction, for which a proxy q_ψ(θ|x) ∝ p(θ) e^{f_ψ(θ,x)} stands in for
the unknown π (Ben-Dov & Chamon, arXiv 2511.11159). Training has three parts:

    0. plain NPE with its early stopping: the first main, and the held-out value to beat;
    1. the proxy, fitted to the same simulations, and how far it can be trusted;
    2. the symmetric stage: main and proxy against each other under multipliers that adapt.

The weights returned are the last, annealed ones if they satisfy the constraint within its tolerance
and do not fall behind plain NPE on the held-out simulations; else the best ever seen on those.
"""

from __future__ import annotations

import os
import warnings
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from sbi.neural_nets import posterior_nn
from sbi.utils.torchutils import process_device
from torch.distributions import Distribution
from torch.utils.data import DataLoader

from sbi_jeffreys._sbi import (
    ConditionalDensityEstimator,
    ConditionalEstimatorBuilder,
    ImproperEmpirical,
    PosteriorParameters,
    StartIndexContext,
    Tracker,
)
from sbi_jeffreys.networks.estimators import NamedBuilder, UnconstrainedBuilder
from sbi_jeffreys.networks.spline import with_fast_splines
from sbi_jeffreys.options import JeffreysOptions
from sbi_jeffreys.posteriors.corrected import CorrectedPosterior
from sbi_jeffreys.posteriors.power import pooling_power
from sbi_jeffreys.posteriors.proxy import ProxyPosterior, SampleWith, proxy_posterior
from sbi_jeffreys.proxies import Proxy
from sbi_jeffreys.training import persistence
from sbi_jeffreys.training.arguments import (
    check_constructor,
    check_dataloader_kwargs,
    check_rebuild,
    check_simulations,
    check_train,
)
from sbi_jeffreys.training.persistence import is_picklable
from sbi_jeffreys.training.trainer import TRACES, SymmetricTrainer

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TRACES", "NPE_Jeffreys"]


class NPE_Jeffreys(SymmetricTrainer):
    r"""Neural posterior estimation with the Jeffreys divergence: a drop-in for `sbi.inference.NPE`.

    Args:
        prior: Prior distribution, as sbi takes it. None: the empirical prior of the simulations.
        density_estimator: The main model p_φ(θ|x): a name or builder of sbi's. A name is built in
            transformed spaces (`JeffreysOptions.marginal_transforms`), sbi's `posterior_nn(...)` in
            the prior's unconstrained space, any other builder as it comes.
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
        check_constructor(logging_level, summary_writer, tracker, show_progress_bars, options)
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
        self._name = density_estimator if isinstance(density_estimator, str) else None
        self._choose_builder()
        self._start_anew()
        self._summary.update({name: [] for name in (*TRACES, "proxy", "proxy_held_out")})

    @property
    def proxy(self) -> Proxy | None:
        """The fitted proxy q_ψ of the last training, or None before it."""
        return self._proxy

    def build_corrected_posterior(
        self,
        num_candidates: int = 20_000,
        device: str | None = None,
        power: float | None = None,
    ) -> CorrectedPosterior:
        """The main's posterior with its draws resampled by importance weights (q̃_ψ/p_φ)^β.

        Not the default: it is as good as the proxy at the observation, which the effective sample
        size (`CorrectedPosterior.effective_sample_size`) and `summary["proxy_held_out"]` tell.

        Args:
            num_candidates: Draws of the main that are weighted per observation.
            device: Device of the posterior; the trainer's if None.
            power: β in (0, 1], how far to go from the main to the proxy. None: what scores best on
                the held-out simulations of a first round; 1 after later rounds, whose held-out
                simulations come from a proposal.

        Raises:
            RuntimeError: If there is no proxy: not trained yet, or none for this x.
            ValueError: If `num_candidates` or `power` is out of range.
        """
        main, proxy = self._main_and_proxy()
        return CorrectedPosterior(
            deepcopy(main),
            deepcopy(proxy),
            self._prior,
            num_candidates,
            self._pooling_power() if power is None else power,
            device=device or self._device,
        )

    def _pooling_power(self) -> float:
        """β from the held-out simulations, which a later round draws from a proposal."""
        if self._round > 0:
            return 1.0
        theta, x = (t[self.val_indices].to(self._device) for t in self.get_simulations(0)[:2])
        return pooling_power(*self._main_and_proxy(), theta, x)

    def build_proxy_posterior(
        self,
        sample_with: SampleWith = "importance",
        posterior_parameters: PosteriorParameters | None = None,
        device: str | None = None,
    ) -> ProxyPosterior:
        """The proxy's own posterior q_ψ(θ|x), sampled by sbi: a second opinion beside the main's.

        Args:
            sample_with: "importance" (the main is the proposal), "mcmc", or "rejection" (from the
                prior).
            posterior_parameters: sbi's parameters of that posterior, for instance
                `MCMCPosteriorParameters(num_chains=10)`.
            device: Device of the posterior; the trainer's if None.

        Raises:
            RuntimeError: If there is no proxy: not trained yet, or none for this x.
            ValueError, TypeError: If `sample_with` or `posterior_parameters` are not as above.
        """
        main, proxy = self._main_and_proxy()
        device = device or self._device
        return proxy_posterior(main, proxy, sample_with, posterior_parameters, device)

    def _main_and_proxy(self) -> tuple[ConditionalDensityEstimator, Proxy]:
        if self._neural_net is None or self._proxy is None:
            raise RuntimeError(
                "There is no proxy to build a posterior from. Call train() first; if it warned "
                "that it fell back to plain NPE, use build_posterior() instead."
            )
        return self._neural_net, self._proxy

    # ------------------------------------------------------------------ saving

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one file: simulations, networks, optimisers, random state.

        After `load`, posteriors are the same, and training resumes as if it had never stopped. Two
        things are not kept: the tracker (the loaded object has a new default one), and a
        `density_estimator` that cannot be pickled, such as sbi's `posterior_nn(...)`: without it
        `train(retrain_from_scratch=True)` raises.

        Args:
            path: File to write, complete or not at all; an existing one is replaced.

        Raises:
            TypeError: If something in it cannot be pickled.
        """
        persistence.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | None = None) -> Self:
        """Read what `save` wrote. Loading runs code from the file: load only files you trust.

        Args:
            path: The file.
            device: Where to go on; None: the device it was saved on.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is something else, damaged, or of versions that cannot be read here.
        """
        device = None if device is None else process_device(device)
        inference = persistence.load(path, device)
        if not isinstance(inference, cls):
            raise ValueError(
                f"{path} holds a {type(inference).__name__}, not a {cls.__name__}; load it with "
                f"{type(inference).__name__}.load."
            )
        if device is not None:
            inference._device = device
            for owner in (inference, inference._stage):
                optimizer = getattr(owner, "optimizer", None)
                if optimizer is not None:
                    persistence.place_step_counters(optimizer)
        return inference

    def __getstate__(self) -> dict[str, Any]:
        """sbi's, with the builder where it can be pickled; one given by name is rebuilt."""
        builder = self._build_neural_net
        kept = self._name is not None or is_picklable(builder)
        with warnings.catch_warnings():
            if kept:  # sbi would warn that retrain_from_scratch is lost
                warnings.filterwarnings("ignore", message="When the inference object is pickled")
            state = super().__getstate__()
        return state | {"_build_neural_net": builder if kept and self._name is None else None}

    def __setstate__(self, state_dict: dict[str, Any]) -> None:
        super().__setstate__(state_dict)
        self._choose_builder()

    def _choose_builder(self) -> None:
        """Where the main is built: in transformed spaces where that can be done unasked."""
        known = not isinstance(self._prior, ImproperEmpirical)  # sbi's stand-in for no prior
        transformed = self.options.marginal_transforms
        if self._name is not None:
            named = NamedBuilder(self._name, self._prior if known else None)
            self._build_neural_net = named if transformed else posterior_nn(model=self._name)
        elif transformed and known:
            self._build_neural_net = UnconstrainedBuilder.wrap(self._build_neural_net, self._prior)

    # ------------------------------------------------------------------ what sbi does not check

    def _get_start_index(self, context: StartIndexContext) -> int:
        """sbi's first hook in `train`, so the first place to see the arguments."""
        trained = hasattr(self, "train_indices")
        check_train(self._num_atoms, self._use_combined_loss, context.resume_training, trained)
        self._resuming = bool(context.resume_training)
        return super()._get_start_index(context)

    def get_dataloaders(
        self,
        starting_round: int = 0,
        training_batch_size: int = 200,
        validation_fraction: float = 0.1,
        resume_training: bool = False,
        dataloader_kwargs: dict[str, Any] | None = None,
    ) -> tuple[DataLoader, DataLoader]:
        """sbi's loaders of training and held-out simulations, after a look at those."""
        check_dataloader_kwargs(dataloader_kwargs)
        theta = self.get_simulations(starting_round)[0].to(self._device)
        check_simulations(theta, self._prior, validation_fraction)
        return super().get_dataloaders(
            starting_round,
            training_batch_size,
            validation_fraction,
            resume_training,
            dataloader_kwargs,
        )

    def _initialize_neural_network(self, retrain_from_scratch: bool, start_idx: int) -> None:
        """sbi's, after checking that a new network can be built and is wanted; faster splines."""
        if retrain_from_scratch or self._neural_net is None:
            check_rebuild(self._name, self._build_neural_net, self._resuming)
        super()._initialize_neural_network(retrain_from_scratch, start_idx)
        assert self._neural_net is not None
        with_fast_splines(self._neural_net)

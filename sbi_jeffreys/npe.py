r"""`NPE_Jeffreys`: neural posterior estimation with the symmetric Jeffreys divergence.

Training in five sentences. Plain NPE is trained first, by sbi's own `train()`; it gives the first
main p_φ(θ|x) and the held-out loss that no result may fall behind. A proxy q_ψ(θ|x) is then fitted
to the same simulations, by default p(θ) times a mixture of likelihoods of x, and its loss on
held-out simulations says how far it can be trusted. In the symmetric stage the main is trained on,
to minimise its reverse divergence R to the proxy subject to the constraint that its held-out loss
is as low as the lowest that main or proxy ever reached; gradients of that constraint come from the
simulations (F) and from pairs that the proxy generates (G). The multiplier λ, which weighs
constraint against R, adapts after every epoch, and the constraint has a slack at a price, so that a
requirement that cannot be met gives way. At the end the main has the last, annealed weights if they
satisfy the constraint, otherwise the best ones on held-out simulations, plain NPE's included.

Source: Ben-Dov & Chamon, *Adaptive Symmetrization of the KL Divergence*, arXiv 2511.11159. The
mathematics is in `sbi_jeffreys.objective` and `sbi_jeffreys.training.multipliers`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import sbi.inference
from sbi.utils.torchutils import process_device
from torch import Tensor
from torch.distributions import Distribution
from torch.utils.data import DataLoader

from sbi_jeffreys import _sbi
from sbi_jeffreys._checks import JeffreysWarning
from sbi_jeffreys._sbi import NPE, ConditionalDensityEstimator, PosteriorParameters, Tracker
from sbi_jeffreys.networks.builders import MainBuilder, is_config
from sbi_jeffreys.networks.transforms import PriorTransform
from sbi_jeffreys.options import JeffreysOptions
from sbi_jeffreys.posteriors.corrected import CorrectedPosterior, pooling_power
from sbi_jeffreys.posteriors.proxy import ProxyPosterior, SampleWith, proxy_posterior
from sbi_jeffreys.proxies import Proxy
from sbi_jeffreys.training import persistence
from sbi_jeffreys.training.arguments import TrainArguments, check_constructor, check_simulations
from sbi_jeffreys.training.report import TrainingReport
from sbi_jeffreys.training.symmetric import TRACES
from sbi_jeffreys.training.training import Training

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TRACES", "NPE_Jeffreys", "register"]


class NPE_Jeffreys(NPE):
    r"""Neural posterior estimation with the Jeffreys divergence: a drop-in for `sbi.inference.NPE`.

    Args:
        prior: Prior distribution, as sbi takes it. None: the empirical prior of the simulations.
        density_estimator: The main model p_φ(θ|x): a name ("nsf", "maf", …), a `MainBuilder` where
            x needs an embedding net, or one of sbi's typed configs: these are built in the prior's
            unconstrained space. Any other builder, such as sbi's `posterior_nn(...)`, is used as it
            is. None: "nsf".
        device: Training device.
        logging_level: As in sbi.
        summary_writer: Deprecated by sbi; use `tracker`.
        tracker: Where traces are logged; TensorBoard by default, as in sbi.
        show_progress_bars: Whether training shows progress and prints its report.
        options: Everything about the symmetric objective.

    Raises:
        TypeError, ValueError: Naming the argument, what was expected, what came, and the remedy.

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
        density_estimator: str | MainBuilder | Callable[[Tensor, Tensor], Any] | None = None,
        device: str = "cpu",
        logging_level: int | str = "WARNING",
        summary_writer: Any | None = None,
        tracker: Tracker | None = None,
        show_progress_bars: bool = True,
        options: JeffreysOptions | None = None,
    ) -> None:
        check_constructor(
            prior,
            density_estimator,
            device,
            logging_level,
            summary_writer,
            tracker,
            show_progress_bars,
            options,
        )
        self.options = JeffreysOptions() if options is None else options
        self._builder = self._choose_builder(density_estimator, prior)
        super().__init__(
            prior=prior,
            density_estimator=self._builder,
            device=device,
            logging_level=logging_level,
            summary_writer=summary_writer,
            tracker=tracker,
            show_progress_bars=show_progress_bars,
        )
        self._shows_progress = show_progress_bars
        self._training = Training()
        self.summary.update({name: [] for name in (*TRACES, "proxy", "proxy_held_out")})

    def _choose_builder(self, given: Any, prior: Distribution | None) -> Callable[..., Any]:
        """Our builder for names and configs; the user's own as it is."""
        if given is None or isinstance(given, str) or is_config(given):
            name = "nsf" if given is None else given
            given = MainBuilder(name, marginal_transforms=self.options.marginal_transforms)
        if isinstance(given, MainBuilder):
            return given.with_prior(prior)
        if prior is not None and PriorTransform.fit(prior) is not None:
            warnings.warn(
                "density_estimator is a builder of your own and is used as it is: the posterior "
                "can put mass outside the prior's support, which sampling then rejects. "
                "MainBuilder(name, embedding_net=...) of sbi_jeffreys builds the same networks "
                "inside the support.",
                JeffreysWarning,
                stacklevel=3,
            )
        return given

    @property
    def proxy(self) -> Proxy | None:
        """The fitted proxy q_ψ of the last training, or None before it."""
        return self._training.proxy

    @property
    def training_report(self) -> TrainingReport | None:
        """What the last training decided and what to do about it; None before it."""
        return self._training.report

    def train(
        self,
        num_atoms: int = 10,
        training_batch_size: int = 200,
        learning_rate: float = 5e-4,
        validation_fraction: float = 0.1,
        stop_after_epochs: int = 20,
        max_num_epochs: int = 2**31 - 1,
        clip_max_norm: float | None = 5.0,
        calibration_kernel: Callable[[Tensor], Tensor] | None = None,
        resume_training: bool = False,
        force_first_round_loss: bool = False,
        discard_prior_samples: bool = False,
        use_combined_loss: bool = False,
        retrain_from_scratch: bool = False,
        show_train_summary: bool = False,
        dataloader_kwargs: dict[str, Any] | None = None,
    ) -> ConditionalDensityEstimator:
        """Train plain NPE by sbi's `train`, then the symmetric stage; the arguments are sbi's.

        Resuming continues where training stopped, on the same random stream: a symmetric stage
        under way, or, where there is none, plain NPE. `max_num_epochs` bounds plain NPE, each
        network of the proxy, and the epochs of the symmetric stage, one by one.

        Returns:
            The main p_φ(θ|x), in evaluation mode.

        Raises:
            TypeError, ValueError: If an argument or the simulations are not as they should be.
            RuntimeError: Without simulations, or if there is nothing to resume.

        Warns:
            JeffreysWarning: If the result is not what the method promises; `training_report` has
                the details.
        """
        given = {name: value for name, value in locals().items() if name in _TRAIN_ARGUMENTS}
        arguments = TrainArguments(**given)
        self._check_state(arguments)
        return self._training.run(
            self, super().train, self.options, arguments, self._shows_progress
        )

    def _check_state(self, arguments: TrainArguments) -> None:
        """Refuse what contradicts the state of this object."""
        trained = hasattr(self, "train_indices")
        if arguments.resume_training and not trained:
            raise RuntimeError(
                "resume_training=True, but nothing was trained yet: call train() without it first."
            )
        if arguments.resume_training:
            used, num = len(self.train_indices) + len(self.val_indices), self._training.available
            if num is not None and len(self.get_simulations()[0]) != num:
                raise ValueError(
                    f"resume_training=True continues on the {used} simulations that training began "
                    "with, but simulations were appended since. Call train() without it (with "
                    "force_first_round_loss=True if they come from the prior)."
                )
        if self._builder is None and (arguments.retrain_from_scratch or not trained):
            raise RuntimeError(
                "density_estimator was lost when this object was pickled or copied, because it "
                "cannot be pickled; a new network cannot be built (retrain_from_scratch=True). "
                "Make a new NPE_Jeffreys with it and append the simulations of get_simulations(), "
                "or give the density estimator by name or as a MainBuilder."
            )

    def get_dataloaders(
        self,
        starting_round: int = 0,
        training_batch_size: int = 200,
        validation_fraction: float = 0.1,
        resume_training: bool = False,
        dataloader_kwargs: dict[str, Any] | None = None,
    ) -> tuple[DataLoader, DataLoader]:
        """sbi's loaders of training and held-out simulations, after a check of those.

        Raises:
            ValueError: If the simulations cannot be split or lie outside the prior.
        """
        theta = self.get_simulations(starting_round)[0].to(_sbi.device_of(self))
        check_simulations(theta, _sbi.prior_of(self), validation_fraction)
        self._training.starting_round = starting_round
        return super().get_dataloaders(
            starting_round,
            training_batch_size,
            validation_fraction,
            resume_training,
            dataloader_kwargs,
        )

    # ------------------------------------------------------------------ posteriors

    def build_corrected_posterior(
        self,
        num_candidates: int = 20_000,
        device: str | None = None,
        power: float | None = None,
    ) -> CorrectedPosterior:
        """The main's posterior with its draws resampled by importance weights (q̃_ψ/p_φ)^β.

        Not the default: it is as good as the proxy at the observation, which the effective sample
        size (`CorrectedPosterior.effective_sample_size`) and `training_report` tell.

        Args:
            num_candidates: Draws of the main that are weighted per observation.
            device: Device of the posterior; the trainer's if None.
            power: β in (0, 1], how far to go from the main to the proxy. None: what scores best on
                the held-out simulations of a first round; 1 after later rounds, whose held-out
                simulations come from a proposal.

        Raises:
            RuntimeError: If there is no proxy: not trained yet, or none for this x.
            ValueError: If `num_candidates` or `power` is out of range.

        Warns:
            JeffreysWarning: If training refused the proxy.
        """
        main, proxy = self._main_and_proxy()
        report = self.training_report
        if report is not None and report.refused:
            warnings.warn(
                f"The draws are corrected towards a proxy that training refused "
                f"({report.proxy_status.value}): prefer build_posterior().",
                JeffreysWarning,
                stacklevel=2,
            )
        return CorrectedPosterior(
            deepcopy(main),
            deepcopy(proxy),
            _sbi.prior_of(self),
            num_candidates,
            self._pooling_power() if power is None else power,
            device=device or str(_sbi.device_of(self)),
        )

    def _pooling_power(self) -> float:
        """β from the held-out simulations, which a later round draws from a proposal."""
        if _sbi.latest_round(self) > 0:
            return 1.0
        device = _sbi.device_of(self)
        theta, x = (t[self.val_indices].to(device) for t in self.get_simulations(0)[:2])
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
        device = device or str(_sbi.device_of(self))
        return proxy_posterior(main, proxy, sample_with, posterior_parameters, device)

    def _main_and_proxy(self) -> tuple[ConditionalDensityEstimator, Proxy]:
        main = _sbi.network_of(self)
        if main is None or self.proxy is None:
            raise RuntimeError(
                "There is no proxy to build a posterior from. Call train() first; if it warned "
                "that it fell back to plain NPE, use build_posterior() instead."
            )
        return main, self.proxy

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
        main, tensors = _sbi.network_of(self), {}
        if main is not None:
            theta, x, _ = self.get_simulations()
            tensors = {"theta": theta, "x": x, "train": self.train_indices, "val": self.val_indices}
            tensors["main"] = dict(main.state_dict())
        persistence.save(self, path, tensors)

    def load_weights(self, path: str | os.PathLike[str]) -> Self:
        """Take simulations and the main's weights from a saved file; no code of the file is run.

        For a file that you do not trust: make an `NPE_Jeffreys` as it was made (same prior and
        `density_estimator`), call this, and build posteriors. The proxy is not restored.

        Args:
            path: A file written by `save` after a training in one round.

        Returns:
            self.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is something else, or its weights do not fit this object's network.
            RuntimeError: If this object has simulations already.
        """
        if _sbi.latest_round(self) >= 0:
            raise RuntimeError(
                "load_weights needs an object without simulations; make a new NPE_Jeffreys."
            )
        saved = persistence.load_tensors(path, str(_sbi.device_of(self)))
        if "main" not in saved:
            raise ValueError(f"{path} holds no trained main; save it after train().")
        self.append_simulations(saved["theta"], saved["x"], exclude_invalid_x=False)
        self.train_indices, self.val_indices = saved["train"], saved["val"]
        rows = saved["train"].cpu()
        main = self._builder(saved["theta"].cpu()[rows], saved["x"].cpu()[rows])
        try:
            main.load_state_dict(saved["main"])
        except RuntimeError as error:
            raise ValueError(
                f"The weights of {path} do not fit the density_estimator of this object: {error}. "
                "Make it with the prior and density_estimator that the file was saved with."
            ) from error
        _sbi.set_network(self, main.to(_sbi.device_of(self)).eval())
        return self

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | None = None) -> Self:
        """Read what `save` wrote. This runs code from the file: for one that you do not trust, use
        `load_weights`.

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
            _sbi.set_device(inference, device)
            for owner in (inference, inference._training.stage):
                optimizer = getattr(owner, "optimizer", None)
                if optimizer is not None:
                    persistence.place_step_counters(optimizer)
        return inference

    def __getstate__(self) -> dict[str, Any]:
        """sbi's, with the builder where it can be pickled."""
        kept = persistence.is_picklable(self._builder)
        with warnings.catch_warnings():
            if kept:  # sbi would warn that retrain_from_scratch is lost
                warnings.filterwarnings("ignore", message="When the inference object is pickled")
            state = super().__getstate__()
        return state | {"_builder": self._builder if kept else None}

    def __setstate__(self, state_dict: dict[str, Any]) -> None:
        super().__setstate__(state_dict)
        _sbi.set_builder(self, self._builder)


_TRAIN_ARGUMENTS = frozenset(TrainArguments.__dataclass_fields__)


def register() -> None:
    """Let `sbi.inference.infer` know the method "npe_jeffreys"; calling it again changes nothing.

    `infer` looks methods up as upper-case attributes of `sbi.inference`. Setting one on somebody
    else's package is not what an import may do, hence this explicit call.

    Example:
        >>> import sbi.inference
        >>> from sbi_jeffreys import register
        >>> register()
        >>> sbi.inference.NPE_JEFFREYS.__name__
        'NPE_Jeffreys'
    """
    sbi.inference.NPE_JEFFREYS = NPE_Jeffreys  # type: ignore[attr-defined]

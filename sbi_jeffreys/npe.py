r"""`NPE_Jeffreys`: neural posterior estimation with the symmetric Jeffreys divergence.

Training in six sentences. Plain NPE is trained first, by sbi's own `train()`, which gives the
first main p_φ(θ|x) and the held-out loss that later weights are compared with. A proxy q_ψ(θ|x) is
then fitted to the same simulations, by default p(θ) times a mixture of likelihoods of x, and the
proxy's loss on held-out simulations determines how far it is trusted. In the symmetric stage the
main minimises its reverse divergence R to the proxy, subject to the constraint that its held-out
loss is as low as the lowest that main and proxy have reached so far; gradients of that constraint
come from the simulations (F) and from pairs that are drawn from the proxy (G). The multiplier λ,
which weighs constraint against R, adapts after every epoch, and a slack, which has a price, relaxes
a constraint that cannot be met. At the end the main has the last, annealed weights if they satisfy
the constraint and are not clearly behind plain NPE, otherwise the best ones on held-out
simulations, plain NPE's included. Where plain NPE is kept, in a first round and under a bounded
prior, a second plain NPE, with θ as it is instead of in the prior's unconstrained space, takes its
place if it is better on held-out simulations.

Source: Ben-Dov & Chamon, *Adaptive Symmetrization of the KL Divergence*, arXiv 2511.11159. The
mathematics is in `sbi_jeffreys.objective` and `sbi_jeffreys.training.multipliers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sbi.inference
from torch import Tensor
from torch.distributions import Distribution
from torch.utils.data import DataLoader

from sbi_jeffreys import _sbi
from sbi_jeffreys._sbi import ConditionalDensityEstimator, Tracker
from sbi_jeffreys.networks.builders import MainBuilder, main_builder
from sbi_jeffreys.options import JeffreysOptions, Preset
from sbi_jeffreys.posteriors.building import BuildsPosteriors
from sbi_jeffreys.proxies import Proxy
from sbi_jeffreys.training.arguments import TrainArguments, check_constructor, with_event
from sbi_jeffreys.training.data import is_atomic, latest_held_out, simulations_in_use
from sbi_jeffreys.training.report import TrainingReport
from sbi_jeffreys.training.saving import SavedTrainer
from sbi_jeffreys.training.simulations import (
    check_appended,
    check_simulations,
    warn_of_copies,
    with_own_prior,
)
from sbi_jeffreys.training.symmetric import TRACES
from sbi_jeffreys.training.training import Training

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TRACES", "NPE_Jeffreys", "register"]


class NPE_Jeffreys(BuildsPosteriors, SavedTrainer):
    r"""Neural posterior estimation with the Jeffreys divergence: a drop-in for `sbi.inference.NPE`.

    Args:
        prior: Prior distribution, as sbi takes it. None: the empirical prior of the simulations.
        density_estimator: The main model p_φ(θ|x): a name ("nsf", "maf", …), a `MainBuilder` where
            x needs an embedding net, or one of sbi's typed configs, all of which are built in the
            prior's unconstrained space. Any other builder, such as sbi's `posterior_nn(...)`, is
            used as it is. None: "nsf".
        device: Training device.
        logging_level: As in sbi.
        summary_writer: Deprecated by sbi; use `tracker`.
        tracker: Tracker to which traces are logged; TensorBoard by default, as in sbi.
        show_progress_bars: Whether training shows progress and prints its report.
        options: "fast", "default" or "thorough" (see `JeffreysOptions.preset`), or everything about
            the symmetric objective, as `JeffreysOptions`.

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
        options: JeffreysOptions | Preset | None = None,
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
        prior = with_event(prior)
        if isinstance(options, str):
            options = JeffreysOptions.preset(options)
        self.options = JeffreysOptions() if options is None else options
        self._builder = main_builder(density_estimator, prior, self.options.marginal_transforms)
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

    @property
    def proxy(self) -> Proxy | None:
        """The fitted proxy q_ψ of the last training, or None before it."""
        return self._training.proxy

    @property
    def training_report(self) -> TrainingReport | None:
        """What the last training decided and what to do about it; None before it."""
        return self._training.report

    def append_simulations(
        self,
        theta: Tensor,
        x: Tensor,
        proposal: Any | None = None,
        exclude_invalid_x: bool | None = None,
        data_device: str | None = None,
    ) -> Self:
        """Store θ `(N, D)` and x `(N, *x_shape)` for training; the arguments are sbi's.

        A gradient that they have, as outputs of a differentiable simulator do, is not used.

        Raises:
            TypeError, ValueError: Naming θ or x, what was expected, what came, and the remedy.
        """
        before = self.get_simulations() if _sbi.latest_round(self) >= 0 else None
        prior = _sbi.prior_of(self)
        check_appended(theta, x, prior, before)
        theta, x = theta.detach(), x.detach()  # mutant: simulations-with-gradients
        proposal = with_own_prior(with_event(proposal), prior)
        with _sbi.all_or_nothing(self):
            return super().append_simulations(theta, x, proposal, exclude_invalid_x, data_device)

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

        Resuming continues a symmetric stage that was begun, otherwise plain NPE, on the same random
        stream. `max_num_epochs` bounds the epochs of plain NPE, of each network of the proxy, and
        of the symmetric stage, each separately.

        Returns the main p_φ(θ|x), in evaluation mode.

        Raises:
            TypeError, ValueError: If an argument or the simulations are not as they should be.
            RuntimeError: Without simulations, or if there is nothing to resume.

        Warns:
            JeffreysWarning: If the result is not what the method promises; `training_report` has
                the details.
        """
        given = {name: value for name, value in locals().items() if name in _TRAIN_ARGUMENTS}
        arguments = TrainArguments(**given)
        self._training.check_resumable(self, self.options, arguments, self._builder)
        return self._training.run(
            self, super().train, self.options, arguments, self._builder, self._shows_progress
        )

    def get_dataloaders(
        self,
        starting_round: int = 0,
        training_batch_size: int = 200,
        validation_fraction: float = 0.1,
        resume_training: bool = False,
        dataloader_kwargs: dict[str, Any] | None = None,
    ) -> tuple[DataLoader, DataLoader]:
        """sbi's loaders of training and held-out simulations, after a check of the simulations.

        Raises:
            ValueError: If the simulations cannot be split or lie outside the prior.
        """
        self._training.check_trainable(self, starting_round)
        if not resume_training:  # a split that is used again was checked when it was made
            theta, x, _ = self.get_simulations(starting_round)
            warn_of_copies(theta, x)
            theta = theta.to(_sbi.device_of(self))
            arguments = self._training.arguments
            atomic = arguments is not None and is_atomic(self, arguments)
            check_simulations(theta, _sbi.prior_of(self), validation_fraction, atomic)
            anew = arguments is not None and arguments.retrain_from_scratch
            builds = anew or _sbi.network_of(self) is None
            if isinstance(self._builder, MainBuilder) and builds:
                _sbi.set_builder(self, self._builder.avoiding_edge(theta))
        self._training.put_back(self)
        self._training.starting_round = starting_round
        self._training.available = len(self.get_simulations()[0])
        return super().get_dataloaders(
            starting_round,
            training_batch_size,
            validation_fraction,
            resume_training,
            dataloader_kwargs,
        )

    def _deciding_pairs(self) -> tuple[Tensor, Tensor]:
        start = self._training.starting_round
        pairs = latest_held_out(self, start)
        theta, x = simulations_in_use(self, start)
        return theta[pairs], x[pairs]


_TRAIN_ARGUMENTS = frozenset(TrainArguments.__dataclass_fields__)


def register() -> None:
    """Make the method "npe_jeffreys" available to `sbi.inference.infer`.

    `infer` looks methods up as upper-case attributes of `sbi.inference`. An import should not set
    attributes of another package, hence this explicit call.

    Example:
        >>> import sbi.inference
        >>> from sbi_jeffreys import register
        >>> register()
        >>> sbi.inference.NPE_JEFFREYS.__name__
        'NPE_Jeffreys'
    """
    sbi.inference.NPE_JEFFREYS = NPE_Jeffreys  # type: ignore[attr-defined]

"""Arguments of the constructor and of `train`, checked before any work is done."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.utils.data import DataLoader

from sbi_jeffreys._checks import check_bool, check_callable, check_float, check_instance, check_int
from sbi_jeffreys.networks.builders import MainBuilder
from sbi_jeffreys.networks.configs import check_trainable, is_config
from sbi_jeffreys.options import JeffreysOptions
from sbi_jeffreys.training.simulations import check_matrix

__all__ = [
    "TrainArguments",
    "check_constructor",
    "check_resumable",
    "lost_builder",
    "with_event",
]

_LEVELS = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG")


def check_constructor(
    prior: Any,
    density_estimator: Any,
    device: Any,
    logging_level: Any,
    summary_writer: Any,
    tracker: Any,
    show_progress_bars: Any,
    options: Any,
) -> None:
    """Check the arguments of `NPE_Jeffreys`."""
    if prior is not None:
        remedy = "pass None, or wrap other priors with sbi.utils.user_input_checks.process_prior"
        check_instance("prior", prior, Distribution, remedy)
        _check_event(with_event(prior))
    check_trainable("density_estimator", density_estimator)
    kinds = density_estimator is None or isinstance(density_estimator, (str, MainBuilder))
    network = isinstance(density_estimator, torch.nn.Module)
    if network or not (kinds or is_config(density_estimator) or callable(density_estimator)):
        raise TypeError(
            "density_estimator must be None, a name such as 'nsf', a MainBuilder, one of sbi's "
            f"configs, or a function of theta and x that builds a density estimator, got "
            f"{type(density_estimator).__name__}; the name 'nsf' is a good start."
        )
    _check_device(device)
    if isinstance(options, str):
        JeffreysOptions.preset(options)  # type: ignore[arg-type]  # refuses other names
    elif options is not None:
        remedy = 'write options="fast" or options=JeffreysOptions(num_steps=…, …)'
        check_instance("options", options, JeffreysOptions, remedy)
    check_bool("show_progress_bars", show_progress_bars)
    _check_methods("tracker", tracker, "log_metric", "flush")  # the methods that training calls
    _check_methods("summary_writer", summary_writer, "add_scalar", "flush")
    if isinstance(logging_level, bool) or not isinstance(logging_level, (int, str)):
        raise TypeError(
            f"logging_level must be an int or one of {_LEVELS}, got "
            f"{type(logging_level).__name__}; pass 'WARNING'."
        )
    if isinstance(logging_level, str) and logging_level.upper() not in _LEVELS:
        raise ValueError(
            f"logging_level must be one of {_LEVELS} or a number such as "
            f"{logging.WARNING}, got {logging_level!r}; pass one of these."
        )


def with_event(prior: Any) -> Any:
    """A prior of torch's over one parameter as a distribution of θ `(1,)`; others as they are.

    sbi takes `Uniform(torch.zeros(1), torch.ones(1))`, whose draws have shape `(N, 1)`, as a prior.
    """
    if _lacks_event(prior) and prior.batch_shape == (1,):
        return Independent(prior, 1)  # mutant: one-parameter-refused
    return prior


def _lacks_event(prior: Any) -> bool:
    """Whether a distribution of torch's has a log density for each component of θ.

    A class of sbi's or of the user's need not declare shapes.
    """
    of_torch = isinstance(prior, Distribution) and type(prior).__module__.startswith("torch.")
    return of_torch and len(prior.event_shape) == 0


def _check_event(prior: Distribution) -> None:
    """Require that one log density belongs to a whole θ, not to each of its components."""
    if _lacks_event(prior):
        raise ValueError(
            "prior must have an event shape (D,), so that log_prob is one number for each theta, "
            f"got event_shape {tuple(prior.event_shape)} and batch_shape "
            f"{tuple(prior.batch_shape)}; pass torch.distributions.Independent(prior, 1) of a "
            "prior with batch_shape (D,), sbi.utils.BoxUniform, or what process_prior returns."
        )


def _check_device(device: Any) -> None:
    """Require a device that torch knows."""
    check_instance("device", device, (str, torch.device), "pass a string such as 'cpu' or 'cuda:0'")
    if str(device) == "gpu":  # sbi's word for whatever accelerator there is
        return
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device must be a string such as 'cpu', 'gpu' or 'cuda:0', got {device!r}; pass one "
            "that torch knows."
        ) from error


@dataclass(frozen=True)
class TrainArguments:
    """The arguments of `train`, each checked; `for_sbi()` returns them for sbi's `train`."""

    num_atoms: int
    training_batch_size: int
    learning_rate: float
    validation_fraction: float
    stop_after_epochs: int
    max_num_epochs: int
    clip_max_norm: float | None
    calibration_kernel: Callable[[Tensor], Tensor] | None
    resume_training: bool
    force_first_round_loss: bool
    discard_prior_samples: bool
    use_combined_loss: bool
    retrain_from_scratch: bool
    show_train_summary: bool
    dataloader_kwargs: dict[str, Any] | None

    def __post_init__(self) -> None:
        check_int("num_atoms", self.num_atoms, 2)
        for name in ("training_batch_size", "stop_after_epochs", "max_num_epochs"):
            check_int(name, getattr(self, name), 1)
        check_float("learning_rate", self.learning_rate, 0, low_open=True)
        check_float("validation_fraction", self.validation_fraction, 0, 1, True, True)
        if self.clip_max_norm is not None:
            check_float("clip_max_norm", self.clip_max_norm, 0, low_open=True)
        if self.calibration_kernel is not None:
            what = "a function from x of shape (N, *x_shape) to weights of shape (N,)"
            check_callable("calibration_kernel", self.calibration_kernel, what)
        for flag in (field.name for field in fields(self) if field.type == "bool"):
            check_bool(flag, getattr(self, flag))
        if self.dataloader_kwargs is not None:
            _check_dataloader_kwargs(self.dataloader_kwargs)
        if self.retrain_from_scratch and self.resume_training:
            raise ValueError(
                "retrain_from_scratch=True contradicts resume_training=True: a new network has no "
                "training to resume. Drop one of them."
            )

    @property
    def lasting(self) -> dict[str, bool]:
        """The arguments that decide which pairs are used and what their losses mean.

        They must not change on resuming. Of the calibration kernel, only its presence is compared.
        """
        names = ("force_first_round_loss", "discard_prior_samples", "use_combined_loss")
        flags = {name: getattr(self, name) for name in names}
        return flags | {"calibration_kernel": self.calibration_kernel is not None}

    def for_sbi(self) -> dict[str, Any]:
        """The arguments as keywords of sbi's `train`."""
        return dict(vars(self))

    def check_trainable(self, theta: Tensor, x: Tensor) -> None:
        """Check, before plain NPE is trained, that θ is a matrix and the kernel accepts x."""
        check_matrix(theta)
        self.kernel(x)

    def kernel(self, x: Tensor) -> Tensor:
        """Weights of x by the calibration kernel, `(N,)`, checked; ones without a kernel."""
        if self.calibration_kernel is None:
            return torch.ones(len(x), device=x.device)
        weights = self.calibration_kernel(x)
        if not isinstance(weights, Tensor) or weights.shape != (len(x),):
            got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(
                f"calibration_kernel must return a tensor of shape ({len(x)},), one weight for "
                f"each x, got {got}; reduce over the dimensions of x."
            )
        if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
            raise ValueError(
                "calibration_kernel must return finite weights ≥ 0, got "
                f"{weights.min().item()} to {weights.max().item()}; clamp them."
            )
        return weights


def _check_dataloader_kwargs(kwargs: Any) -> None:
    """Require keywords of a DataLoader."""
    remedy = "pass None, or a dict of keywords of torch.utils.data.DataLoader"
    check_instance("dataloader_kwargs", kwargs, Mapping, remedy)
    known = inspect.signature(DataLoader.__init__).parameters
    unknown = sorted(str(key) for key in kwargs if key not in known)
    if unknown:
        raise TypeError(
            f"dataloader_kwargs must be arguments of torch.utils.data.DataLoader, got "
            f"{', '.join(unknown)}; remove them."
        )


_FREE = ("proxy", "checkpoint", "checkpoint_seconds")  # may change; a copied proxy is another one


def check_resumable(
    begun: int | None,
    available: int,
    options: JeffreysOptions,
    begun_options: JeffreysOptions | None,
    arguments: TrainArguments,
    begun_arguments: Mapping[str, bool] | None,
) -> None:
    """Refuse to resume a training that did not begin, or began with other simulations or options.

    Args:
        begun: Number of simulations that training began with; None if it did not begin.
        available: Number of simulations that there are now.
        options: The trainer's present options.
        begun_options: Options that the symmetric stage began with; None without a stage.
        arguments: Arguments of the present call of `train`.
        begun_arguments: `lasting` arguments of the call of `train` that began the training; None
            if they are not known.
    """
    if begun is None:
        raise RuntimeError(
            "resume_training=True, but nothing was trained yet: call train() without it first."
        )
    if available != begun:
        raise ValueError(
            f"resume_training=True continues on the {begun} simulations that training began with, "
            f"but now there are {available}. Call train() without it (with "
            "force_first_round_loss=True if the new ones come from the prior)."
        )
    for name, now in arguments.lasting.items():
        before = now if begun_arguments is None else begun_arguments[name]
        if now != before:  # mutant: resumed-in-other-units
            shown = ("one", "none") if name == "calibration_kernel" else ("True", "False")
            raise ValueError(
                f"{name}: training began with {shown[not before]}, and resume_training=True goes "
                f"on with it, got {shown[not now]}; pass it again as it was, or train anew without "
                "resume_training."
            )
    began = vars(options) if begun_options is None else vars(begun_options)
    changed = [n for n, value in vars(options).items() if n not in _FREE and value != began[n]]
    if changed:
        raise ValueError(
            f"options were changed since the symmetric stage began ({', '.join(changed)}); "
            "resume_training=True goes on with the stage as it is. Set them back, or train anew "
            "without resume_training."
        )


def lost_builder() -> RuntimeError:
    """The error for a network that cannot be built because its builder could not be pickled."""
    return RuntimeError(
        "density_estimator was lost when this object was pickled or copied, because it cannot be "
        "pickled; a new network cannot be built (retrain_from_scratch=True). Make a new "
        "NPE_Jeffreys with it and append the simulations of get_simulations(), or give the density "
        "estimator by name or as a MainBuilder."
    )


def _check_methods(name: str, value: Any, *methods: str) -> None:
    missing = [m for m in methods if value is not None and not callable(getattr(value, m, None))]
    if missing:
        raise TypeError(
            f"{name} must have the methods {', '.join(methods)}, but {type(value).__name__} lacks "
            f"{', '.join(missing)}; pass None for sbi's default."
        )

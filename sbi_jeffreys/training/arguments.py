"""Checks of the arguments that sbi takes as they come: constructor and `train`.

sbi's own dataclasses check the others, under the same promise: the error names the argument.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from sbi.utils import within_support
from torch import Tensor
from torch.distributions import Distribution
from torch.utils.data import DataLoader

from sbi_jeffreys._sbi import ImproperEmpirical, model_builders
from sbi_jeffreys.options import JeffreysOptions

__all__ = [
    "check_constructor",
    "check_dataloader_kwargs",
    "check_rebuild",
    "check_simulations",
    "check_train",
]

_TRACKER_METHODS = ("log_metric", "flush")  # of sbi's protocol, what training calls
_WRITER_METHODS = ("add_scalar", "flush")
_LEVELS = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG")


def check_constructor(
    logging_level: Any,
    summary_writer: Any,
    tracker: Any,
    show_progress_bars: Any,
    options: Any,
) -> None:
    """Check what `NPE_Jeffreys` is made from; sbi checks prior, device and builders.

    Names of density estimators are checked where they are built, as in sbi (`check_rebuild`).

    Raises:
        TypeError, ValueError: Naming the argument, what was expected, what came, and the remedy.
    """
    if options is not None and not isinstance(options, JeffreysOptions):
        raise TypeError(
            f"options must be a JeffreysOptions or None, got {type(options).__name__}; "
            "write options=JeffreysOptions(num_steps=…, …)."
        )
    _check_bool("show_progress_bars", show_progress_bars)
    _check_methods("tracker", tracker, _TRACKER_METHODS)
    _check_methods("summary_writer", summary_writer, _WRITER_METHODS)
    if isinstance(logging_level, bool) or not isinstance(logging_level, (int, str)):
        raise TypeError(
            f"logging_level must be an int or one of {_LEVELS}, got {type(logging_level).__name__}."
        )
    if isinstance(logging_level, str) and logging_level.upper() not in _LEVELS:
        raise ValueError(
            f"logging_level must be one of {_LEVELS} or a number such as "
            f"{logging.WARNING}, got {logging_level!r}."
        )


def check_train(num_atoms: Any, use_combined_loss: Any, resume: Any, trained: bool) -> None:
    """Check what sbi's `train` passes on unchecked.

    Raises:
        TypeError, ValueError: If `num_atoms` or `use_combined_loss` is wrong.
        RuntimeError: If there is nothing to resume.
    """
    if not isinstance(num_atoms, int) or isinstance(num_atoms, bool):
        raise TypeError(f"num_atoms must be an int ≥ 2, got {type(num_atoms).__name__}.")
    if num_atoms < 2:
        raise ValueError(f"num_atoms must be at least 2 (truth and one contrast), got {num_atoms}.")
    _check_bool("use_combined_loss", use_combined_loss)
    if resume and not trained:
        raise RuntimeError(
            "resume_training=True, but nothing was trained yet: call train() without it first."
        )


def check_dataloader_kwargs(kwargs: Any) -> None:
    """Check that the keywords are a DataLoader's.

    Raises:
        TypeError: If they are no dict, or have a key that DataLoader does not know.
    """
    if kwargs is None:
        return
    if not isinstance(kwargs, Mapping):
        raise TypeError(f"dataloader_kwargs must be a dict or None, got {type(kwargs).__name__}.")
    known = inspect.signature(DataLoader.__init__).parameters
    unknown = sorted(str(key) for key in kwargs if key not in known)
    if unknown:
        raise TypeError(
            f"dataloader_kwargs must be arguments of torch.utils.data.DataLoader, got "
            f"{', '.join(unknown)}; remove them."
        )


def check_simulations(
    theta: Tensor, prior: Distribution | None, validation_fraction: float
) -> None:
    """Check that the simulations can be split, and that their θ can come from the prior.

    Args:
        theta: All θ to train on, `(N, D)`.
        prior: The prior; None or sbi's stand-in for one has no support to check against.
        validation_fraction: Share that is held out, in (0, 1).

    Raises:
        ValueError: If there are too few simulations, or θ has another size than the prior's or
            lies outside its support, where a posterior has no density.
    """
    num = len(theta)
    num_training = int((1 - validation_fraction) * num)  # as sbi splits
    if num_training < 2 or num - num_training < 1:
        raise ValueError(
            f"theta: expected enough simulations for at least two to train on and one held out, "
            f"got {num} with validation_fraction={validation_fraction}; append more simulations."
        )
    if prior is None or isinstance(prior, ImproperEmpirical):
        return
    size = prior.event_shape[-1] if prior.event_shape else None
    if size is not None and theta.shape[-1] != size:
        raise ValueError(
            f"theta: expected shape (N, {size}) as the prior's, got {tuple(theta.shape)}; pass the "
            "prior that the parameters were drawn from."
        )
    inside = within_support(prior, theta)
    if not bool(inside.all()):
        row = int((~inside).nonzero()[0])
        raise ValueError(
            f"theta: expected parameters inside the prior's support, got {int((~inside).sum())} of "
            f"{num} outside it, the first in row {row}: {theta[row].tolist()}; leave them out, or "
            "pass the prior that they were drawn from."
        )


def check_rebuild(name: str | None, builder: Any, resuming: bool) -> None:
    """Check that a new network can be built and is not asked for in the middle of a training.

    Raises:
        ValueError: If training is to be resumed with another network, or its name is unknown.
        RuntimeError: If the builder was lost in pickling.
    """
    if resuming:
        raise ValueError(
            "retrain_from_scratch=True contradicts resume_training=True: a new network has no "
            "training to resume. Drop one of them."
        )
    if name is not None and name not in model_builders:
        raise ValueError(
            f"density_estimator must be a builder or one of {', '.join(model_builders)}, got "
            f"{name!r}."
        )
    if builder is None:
        raise RuntimeError(
            "density_estimator was lost when this object was pickled or copied, because it is a "
            "closure; a new network cannot be built (retrain_from_scratch=True). Make a new "
            "NPE_Jeffreys with it and append the simulations of get_simulations(), or give the "
            "density estimator by name."
        )


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__} ({value!r}).")


def _check_methods(name: str, value: Any, methods: tuple[str, ...]) -> None:
    missing = [m for m in methods if value is not None and not callable(getattr(value, m, None))]
    if missing:
        raise TypeError(
            f"{name} must have the methods {', '.join(methods)}, but {type(value).__name__} lacks "
            f"{', '.join(missing)}; pass None for sbi's default."
        )

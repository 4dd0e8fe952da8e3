"""Checks of simulations: when they are appended, and when they are about to be trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from sbi_jeffreys._checks import check_tensor
from sbi_jeffreys._sbi import ImproperEmpirical
from sbi_jeffreys.networks.transforms import inside_support

__all__ = ["check_appended", "check_matrix", "check_simulations"]


def check_appended(theta: Any, x: Any, prior: Distribution | None, before: Any) -> None:
    """Check what `append_simulations` is given, where sbi has bare assertions.

    Args:
        theta: Parameters.
        x: Simulations.
        prior: The trainer's prior; None or sbi's stand-in has no size to check against.
        before: θ and x of earlier rounds, or None.

    Raises:
        TypeError: If either is no tensor of float32.
        ValueError: If their shapes do not fit each other, the prior, or earlier rounds.
    """
    for name, value in (("theta", theta), ("x", x)):
        check_tensor(name, value)
        if value.dtype != torch.float32:
            raise TypeError(
                f"{name} must be a tensor of float32, as sbi's networks are, got {value.dtype}; "
                f"pass {name}.float()."
            )
        if value.ndim == 0 or len(value) == 0:
            raise ValueError(
                f"{name} must have one row for each simulation, got shape {tuple(value.shape)}; "
                "pass at least one simulation."
            )
    known = prior is not None and not isinstance(prior, ImproperEmpirical)
    if known or theta.ndim != 1:  # without a prior, sbi stores and splits vectors of any meaning
        check_matrix(theta)
    if len(theta) != len(x):
        raise ValueError(
            f"theta and x must have as many rows, got {len(theta)} and {len(x)}; row i of x is the "
            "simulation of row i of theta."
        )
    if not bool(torch.isfinite(theta).all()):
        bad = int((~torch.isfinite(theta.reshape(len(theta), -1))).any(dim=1).sum())
        raise ValueError(
            f"theta must be finite, got NaN or inf in {bad} of {len(theta)} rows; drop these rows "
            "and their simulations."
        )
    size = prior.event_shape[-1] if known and prior is not None and prior.event_shape else None
    if size is not None and theta.shape[1] != size:
        raise ValueError(
            f"theta must have shape (N, {size}) as the prior's draws, got {tuple(theta.shape)}; "
            "pass the prior that the parameters were drawn from."
        )
    if before is not None:
        for name, value, earlier in (("theta", theta, before[0]), ("x", x, before[1])):
            if value.shape[1:] != earlier.shape[1:]:
                raise ValueError(
                    f"{name} must have rows of shape {tuple(earlier.shape[1:])} as in earlier "
                    f"rounds, got {tuple(value.shape[1:])}; simulate with the same simulator."
                )


def check_matrix(theta: Tensor) -> None:
    """Check that θ has one row for each simulation and one column for each parameter.

    Raises:
        ValueError: If θ has not two dimensions.
    """
    if theta.ndim != 2:
        raise ValueError(
            f"theta must have shape (N, D), got {tuple(theta.shape)}; for a single parameter pass "
            "theta.reshape(-1, 1)."
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
    inside = inside_support(prior, theta)
    if not bool(inside.all()):
        row = int((~inside).nonzero()[0])
        raise ValueError(
            f"theta: expected parameters inside the prior's support, got {int((~inside).sum())} of "
            f"{num} outside it, the first in row {row}: {theta[row].tolist()}; drop them, or "
            "pass the prior that they were drawn from."
        )

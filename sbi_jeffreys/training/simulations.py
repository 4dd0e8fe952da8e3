"""Simulations and their proposals: checked when appended, and when about to be trained on."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from sbi_jeffreys._checks import check_tensor, warn
from sbi_jeffreys._sbi import ImproperEmpirical, RestrictedPrior, on_prior, prior_of
from sbi_jeffreys.networks.prior_space import inside_support

__all__ = [
    "check_appended",
    "check_matrix",
    "check_simulations",
    "warn_of_copies",
    "with_own_prior",
]

_FEW_COPIES = 0.1  # share of the simulations that may be copies without a warning


def check_appended(theta: Any, x: Any, prior: Distribution | None, before: Any) -> None:
    """Check the arguments of `append_simulations`; `before` has θ and x of earlier rounds, or None.

    A prior of None, or sbi's stand-in for one, has no size to check against.
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
    if known or theta.ndim != 1:  # without a prior, sbi accepts one-dimensional tensors, too
        check_matrix(theta)
        if x.ndim == 1:
            raise ValueError(
                f"x must have shape (N, ...), one row for each simulation, got {tuple(x.shape)}; "
                "for a single output, pass x.unsqueeze(1)."
            )
    if len(theta) != len(x):
        raise ValueError(
            f"theta and x must have the same number of rows, got {len(theta)} and {len(x)}; row i "
            "of x is the simulation of row i of theta."
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
        for name, value, earlier in zip(("theta", "x"), (theta, x), before):
            if value.shape[1:] != earlier.shape[1:]:
                raise ValueError(
                    f"{name} must have rows of shape {tuple(earlier.shape[1:])} as in earlier "
                    f"rounds, got {tuple(value.shape[1:])}; simulate with the same simulator."
                )


def check_matrix(theta: Tensor) -> None:
    """Check that θ has one row for each simulation and one column for each parameter."""
    if theta.ndim != 2:
        raise ValueError(
            f"theta must have shape (N, D), got {tuple(theta.shape)}; for a single parameter pass "
            "theta.reshape(-1, 1)."
        )


def check_simulations(
    theta: Tensor, prior: Distribution | None, validation_fraction: float, atomic: bool = False
) -> None:
    """Check that simulations with θ `(N, D)` can be split and that θ can come from the prior.

    The atomic loss of later rounds divides by the prior, which must not be zero at any θ.
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
    inside = inside_support(prior, theta)
    if not bool(inside.all()):
        row = int((~inside).nonzero()[0])
        raise ValueError(
            f"theta: expected parameters inside the prior's support, got {int((~inside).sum())} of "
            f"{num} outside it, the first in row {row}: {theta[row].tolist()}; drop them, or "
            "pass the prior that they were drawn from."
        )
    if atomic and bool((none := ~torch.isfinite(prior.log_prob(theta).reshape(num))).any()):
        row = int(none.nonzero()[0])
        raise ValueError(
            f"theta: expected parameters at which the prior has a density, as the loss of later "
            f"rounds divides by it, got {int(none.sum())} of {num} without one, the first in row "
            f"{row}: {theta[row].tolist()} (torch's Uniform: at its upper bound); drop them."
        )


def warn_of_copies(theta: Tensor, x: Tensor) -> None:
    """Warn where many simulations, θ `(N, D)` with x `(N, *x_shape)`, are copies of others.

    Of most copies one is held out and another one trained on: overfitting then looks like progress.
    The same θ with another x is a simulation of its own.
    """
    num = len(theta)
    theta, x = theta.reshape(num, -1), x.reshape(num, -1)  # without a prior, vectors are accepted
    if len(torch.unique(theta, dim=0)) > (1 - _FEW_COPIES) * num:
        return
    copies = num - len(torch.unique(torch.cat([theta, x.to(theta)], dim=1), dim=0))
    if copies > _FEW_COPIES * num:  # mutant: copies-in-silence
        warn(
            f"{copies} of {num} simulations are copies of others, theta and x alike. Simulations "
            "that are held out are then also trained on: training stops too late, and what the "
            "report says of held-out simulations is too good. Append each simulation once.",
        )


def with_own_prior(proposal: Any, prior: Distribution) -> Any:
    """The proposal, its prior replaced by the trainer's own if it is another object of equal value.

    sbi recognises the prior by identity, which saving and loading a trainer, or copying it, loses.
    """
    if isinstance(proposal, RestrictedPrior) and _same_value(prior_of(proposal), prior):
        return on_prior(proposal, prior)
    # mutant: loaded-prior-unknown
    return prior if _same_value(proposal, prior) else proposal


def _same_value(one: Any, other: Any, depth: int = 8) -> bool:
    """Whether two objects, such as priors, have the same type and the same attributes, recursively.

    An attribute that only one of them has is a value that torch computes when it is asked for, and
    does not count if the class knows its name.
    """
    if one is other:
        return True
    if type(one) is not type(other) or depth == 0:
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and bool((one.cpu() == other.cpu()).all())
    if isinstance(one, (list, tuple)):
        same_size = len(one) == len(other)
        return same_size and all(_same_value(*both, depth - 1) for both in zip(one, other))
    if isinstance(one, dict):
        keys = one.keys() == other.keys()
        return keys and all(_same_value(one[key], other[key], depth - 1) for key in one)
    if isinstance(one, type) or inspect.isroutine(one):
        return False
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    if hasattr(one, "__dict__"):
        mine, theirs = vars(one), vars(other)
        known = all(hasattr(type(one), key) for key in mine.keys() ^ theirs.keys())
        shared = mine.keys() & theirs.keys()
        return known and all(_same_value(mine[k], theirs[k], depth - 1) for k in shared)
    try:
        return bool(one == other)
    except (TypeError, ValueError, RuntimeError):
        return False

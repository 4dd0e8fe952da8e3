"""Checks of what posteriors are asked: shapes of samples, observations and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sbi_jeffreys._checks import check_tensor

__all__ = [
    "check_batched_theta",
    "check_observation",
    "check_observations",
    "check_prior",
    "check_sample_shape",
    "check_theta",
]


def check_prior(prior: Any) -> None:
    """Require methods `sample` and `log_prob`.

    Raises:
        TypeError: If one of them is missing.
    """
    missing = [m for m in ("sample", "log_prob") if not callable(getattr(prior, m, None))]
    if missing:
        raise TypeError(
            f"prior must have methods sample and log_prob, got {type(prior).__name__} without "
            f"{' and '.join(missing)}; pass a torch distribution or what process_prior returns."
        )


def check_sample_shape(sample_shape: Any) -> torch.Size:
    """Require a tuple of positive ints; the empty tuple is one draw.

    Raises:
        TypeError: If it is no sequence of ints.
        ValueError: If a size is not positive.
    """
    is_sequence = isinstance(sample_shape, (tuple, list))
    if not is_sequence or any(isinstance(n, bool) or not isinstance(n, int) for n in sample_shape):
        raise TypeError(
            f"sample_shape must be a tuple of ints, got {type(sample_shape).__name__} "
            f"({sample_shape!r}); pass (1000,) for 1,000 draws."
        )
    if any(n < 1 for n in sample_shape):
        raise ValueError(
            f"sample_shape must be a tuple of positive ints, got {tuple(sample_shape)}; pass "
            "(1000,) for 1,000 draws."
        )
    return torch.Size(sample_shape)


def check_observation(x: Any, shape: Sequence[int]) -> Tensor:
    """Require one finite observation; returns it as `(1, *shape)`.

    Args:
        x: A tensor or an array, with or without a batch dimension of one; None stands for a default
            that was not set.
        shape: Shape of one simulation.

    Raises:
        TypeError: If it is no tensor or array of numbers.
        ValueError: If it is missing, of another shape, or not finite.
    """
    if x is None:
        raise ValueError(
            "x must be an observation, got None, and no default x is set; pass x=x_o, or call "
            "set_default_x(x_o) first."
        )
    values = _numbers("x", x)
    if _without_ones(values.shape) != _without_ones(shape):
        raise ValueError(
            f"x must be one observation of shape {tuple(shape)}, got shape {tuple(values.shape)}; "
            "for several observations use sample_batched or log_prob_batched."
        )
    return check_tensor("x", values, finite=True).reshape(1, *shape)


def check_observations(x: Any, shape: Sequence[int]) -> Tensor:
    """Require at least one finite observation; returns `(B, *shape)`.

    Raises:
        TypeError: If it is no tensor or array of numbers.
        ValueError: If it is of another shape, empty, or not finite.
    """
    values = _numbers("x", x)
    if tuple(values.shape) == tuple(shape):
        values = values.unsqueeze(0)
    if tuple(values.shape[1:]) != tuple(shape) or len(values) == 0:
        expected = ", ".join(map(str, ("B", *shape)))
        raise ValueError(
            f"x must be observations of shape ({expected}), B ≥ 1, got shape "
            f"{tuple(values.shape)}; stack them along a first dimension."
        )
    return check_tensor("x", values, finite=True, remedy="leave such observations out")


def check_theta(theta: Any, shape: Sequence[int]) -> Tensor:
    """Require parameters `(N, D)`, or `(D,)` for one; returns `(N, D)`.

    Raises:
        TypeError: If they are no tensor or array of numbers.
        ValueError: If their shape is another.
    """
    values = _numbers("theta", theta)
    if tuple(values.shape) == tuple(shape):
        values = values.unsqueeze(0)
    remedy = "pass one row per parameter vector, of the dimension that was trained on"
    return check_tensor("theta", values, ("N", *shape), remedy=remedy)


def check_batched_theta(theta: Any, batch: int, shape: Sequence[int]) -> Tensor:
    """Require parameters `(N, B, D)`, or `(B, D)` for one each; returns `(N, B, D)`.

    Raises:
        TypeError: If they are no tensor or array of numbers.
        ValueError: If their shape is another.
    """
    values = _numbers("theta", theta)
    if tuple(values.shape) == (batch, *shape):
        values = values.unsqueeze(0)
    remedy = "pass as many columns as there are observations in x"
    return check_tensor("theta", values, ("N", batch, *shape), remedy=remedy)


def _numbers(name: str, value: Any) -> Tensor:
    """A float32 tensor of what is a tensor, an array, or nested lists of numbers."""
    try:
        return torch.as_tensor(value).to(torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} must be a tensor or an array of numbers, got {type(value).__name__}; pass "
            f"torch.as_tensor({name}, dtype=torch.float32)."
        ) from None


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]

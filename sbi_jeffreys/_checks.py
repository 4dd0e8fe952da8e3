"""Checks of arguments: every error names the argument, what was expected, what came, the remedy.

A wrong kind of object is a `TypeError`, a value out of range a `ValueError`. Configs, posteriors,
reports and figures all check with these few functions, so that their messages read alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "JeffreysWarning",
    "check_bool",
    "check_callable",
    "check_choice",
    "check_float",
    "check_instance",
    "check_int",
    "check_observation",
    "check_observations",
    "check_prior",
    "check_rows",
    "check_sample_shape",
    "check_tensor",
]


def _kind(value: Any) -> str:
    text = repr(value)
    short = text if len(text) <= 60 else text[:57] + "…"
    return f"{type(value).__name__} ({short})"


def _remedy(remedy: str) -> str:
    return f"; {remedy}." if remedy else "."


def check_int(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """Require an integer in [minimum, maximum]; a bool or a float is none.

    Args:
        name: The argument's name, as the user wrote it.
        value: What was passed.
        minimum: Smallest value allowed.
        maximum: Largest value allowed; None: no bound.

    Returns:
        The value.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is out of range.
    """
    bounds = f"≥ {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int {bounds}, got {_kind(value)}; pass a whole number.")
    if value < minimum or (maximum is not None and value > maximum):
        raise ValueError(f"{name} must be an int {bounds}, got {value}; choose one in this range.")
    return value


def check_float(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
    remedy: str = "",
) -> float:
    """Require a finite number in an interval whose ends may be excluded.

    Args:
        name: The argument's name.
        value: What was passed.
        low: Lower end.
        high: Upper end; a finite value is required even where this is infinite.
        low_open: Whether the lower end is excluded.
        high_open: Whether the upper end is excluded.
        remedy: What to write instead, without a full stop.

    Returns:
        The value.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is NaN, infinite or out of range.
    """
    left = "(" if low_open or math.isinf(low) else "["
    right = ")" if high_open or math.isinf(high) else "]"
    interval = f"{left}{low:g}, {high:g}{right}"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(
            f"{name} must be a number in {interval}, got {_kind(value)}"
            + _remedy(remedy or "pass a float")
        )
    inside = (value > low if low_open else value >= low) and (
        value < high if high_open else value <= high
    )
    if not inside or not math.isfinite(value):
        raise ValueError(
            f"{name} must be a finite number in {interval}, got {value}"
            + _remedy(remedy or "choose one in this range")
        )
    return value


def check_bool(name: str, value: Any) -> bool:
    """Require True or False.

    Raises:
        TypeError: If it is anything else, 0, 1 and strings included.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {_kind(value)}; pass True or False.")
    return value


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Require one of a few strings.

    Raises:
        TypeError: If it is no string.
        ValueError: If it is another one.
    """
    listed = ", ".join(repr(choice) for choice in choices)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {listed}, got {_kind(value)}; pass such a string.")
    if value not in choices:
        raise ValueError(f"{name} must be one of {listed}, got {value!r}; choose one of these.")
    return value


def check_instance(name: str, value: Any, kinds: type | tuple[type, ...], remedy: str = "") -> Any:
    """Require an object of a class, or of one of several.

    Args:
        name: The argument's name.
        value: What was passed.
        kinds: The class or classes.
        remedy: What to write instead, without a full stop.

    Raises:
        TypeError: If it is of another class.
    """
    if not isinstance(value, kinds):
        classes = kinds if isinstance(kinds, tuple) else (kinds,)
        listed = " or ".join(cls.__name__ for cls in classes)
        raise TypeError(
            f"{name} must be of type {listed}, got {_kind(value)}"
            + _remedy(remedy or f"pass a {classes[0].__name__}")
        )
    return value


def check_callable(name: str, value: Any, what: str, remedy: str = "") -> Any:
    """Require something that can be called; `what` says as what ("a function of theta and x").

    Raises:
        TypeError: If it cannot.
    """
    if not callable(value):
        raise TypeError(
            f"{name} must be {what}, got {_kind(value)}" + _remedy(remedy or "pass a function")
        )
    return value


def check_tensor(
    name: str,
    value: Any,
    shape: Sequence[int | str] | None = None,
    finite: bool = False,
    remedy: str = "",
) -> Tensor:
    """Require a tensor of floating-point numbers of a shape.

    Args:
        name: The argument's name.
        value: What was passed.
        shape: Sizes; a string stands for any size and names it ("N", "D"). None: any shape.
        finite: Whether NaN and ±∞ are refused.
        remedy: What to write instead, without a full stop.

    Returns:
        The tensor.

    Raises:
        TypeError: If it is no tensor, or one of integers, booleans or complex numbers.
        ValueError: If its shape is another, or something in it is not finite.
    """
    expected = "" if shape is None else f" of shape ({', '.join(map(str, shape))})"
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a torch tensor{expected}, got {_kind(value)}"
            + _remedy(remedy or f"pass torch.as_tensor({name}, dtype=torch.float32)")
        )
    if not value.is_floating_point():
        raise TypeError(
            f"{name} must be a tensor of floating-point numbers, got dtype {value.dtype}"
            + _remedy(remedy or f"pass {name}.float()")
        )
    if shape is not None:
        sizes = tuple(value.shape)
        fits = len(sizes) == len(shape) and all(
            isinstance(want, str) or want == size for want, size in zip(shape, sizes)
        )
        if not fits:
            raise ValueError(
                f"{name} must be a tensor{expected}, got shape {sizes}"
                + _remedy(remedy or "reshape it")
            )
    if finite and not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise ValueError(
            f"{name} must be finite, got NaN or inf in {bad} of {value.numel()} entries"
            + _remedy(remedy or "drop or mask them")
        )
    return value


def _numbers(name: str, value: Any) -> Tensor:
    """A float32 tensor of what is a tensor, an array, or nested lists of numbers."""
    try:
        return torch.as_tensor(value).to(torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} must be a tensor or an array of numbers, got {type(value).__name__}; pass "
            f"torch.as_tensor({name}, dtype=torch.float32)."
        ) from None


def check_rows(
    name: str, value: Any, shape: Sequence[int | str], finite: bool = False, remedy: str = ""
) -> Tensor:
    """Require numbers of a shape, whose first dimension may be missing; see `check_tensor`.

    Returns:
        A float32 tensor of that shape, one row for what came without a first dimension.
    """
    values = _numbers(name, value)
    if tuple(values.shape) == tuple(shape[1:]):
        values = values.unsqueeze(0)
    return check_tensor(name, values, shape, finite, remedy)


def check_observations(x: Any, shape: Sequence[int]) -> Tensor:
    """Require at least one finite observation of a shape; returns `(B, *shape)`."""
    remedy = "pass one row of finite numbers for each of B observations"
    values = check_rows("x", x, ("B", *shape), finite=True, remedy=remedy)
    if len(values) == 0:
        raise ValueError(f"x must have B ≥ 1 rows, got shape {tuple(values.shape)}; {remedy}.")
    return values


def check_observation(x: Any, shape: Sequence[int]) -> Tensor:
    """Require one finite observation, with or without dimensions of one; returns `(1, *shape)`.

    None stands for a default that was not set.
    """
    if x is None:
        raise ValueError(
            "x must be an observation, got None, and no default x is set; pass x=x_o, or call "
            "set_default_x(x_o) first."
        )
    values = _numbers("x", x)
    if [size for size in values.shape if size != 1] != [size for size in shape if size != 1]:
        raise ValueError(
            f"x must be one observation of shape {tuple(shape)}, got shape {tuple(values.shape)}; "
            "for several observations use sample_batched or log_prob_batched."
        )
    return check_tensor("x", values, finite=True).reshape(1, *shape)


def check_sample_shape(sample_shape: Any) -> torch.Size:
    """Require a tuple of positive ints; the empty tuple is one draw.

    Raises:
        TypeError: If it is no sequence of ints.
        ValueError: If a size is not positive.
    """
    remedy = "pass (1000,) for 1,000 draws"
    for size in check_instance("sample_shape", sample_shape, (tuple, list), remedy):
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"sample_shape must be ints, got {_kind(sample_shape)}; {remedy}.")
        if size < 1:
            raise ValueError(f"sample_shape must be positive, got {sample_shape}; {remedy}.")
    return torch.Size(sample_shape)


def check_prior(prior: Any, methods: Sequence[str] = ("sample", "log_prob")) -> Any:
    """Require the methods of a prior.

    Raises:
        TypeError: If one of them is missing.
    """
    missing = [method for method in methods if not callable(getattr(prior, method, None))]
    if missing:
        raise TypeError(
            f"prior must have {' and '.join(methods)}, got {type(prior).__name__} without "
            f"{' and '.join(missing)}; pass a torch distribution or what process_prior returns."
        )
    return prior


class JeffreysWarning(UserWarning):
    """A result is not what the method promises; the message says why and what to do.

    The one warning class of the package: `warnings.simplefilter("error", JeffreysWarning)` turns
    all of its warnings into errors, `"ignore"` silences them.
    """

"""Checks of arguments: every error names the argument, what was expected, what came, the remedy.

Every check returns the value that it accepts. A wrong kind of object is a `TypeError`, a value out
of range a `ValueError`. A `remedy` says what to write instead, without a full stop.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor


class JeffreysWarning(UserWarning):
    """A result is not what the method promises; the message says why and what to do.

    The one warning class of the package: `warnings.simplefilter("error", JeffreysWarning)` turns
    all of its warnings into errors, `"ignore"` silences them.
    """


# Packages whose frames stand between a call of the user's and the warning that it leads to.
_NOT_THE_USERS = {"sbi", "sbi_jeffreys", "torch", "contextlib"}


def warn(message: str) -> None:
    """Warn at the line of the user's that led here: the innermost one outside sbi and this package.

    How many frames of sbi's lie between the two depends on its version.
    """
    frame, level = inspect.currentframe(), 1
    # mutant: warns-at-its-own-line
    while frame is not None and _package(frame) in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, JeffreysWarning, stacklevel=level)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _kind(value: Any) -> str:
    text = repr(value)
    short = text if len(text) <= 60 else text[:57] + "…"
    return f"{type(value).__name__} ({short})"


def check_int(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """Require an integer in [minimum, maximum]; a bool or a float is refused."""
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
    """Require a finite number in an interval, whose ends may be excluded."""
    left = "(" if low_open or math.isinf(low) else "["
    right = ")" if high_open or math.isinf(high) else "]"
    interval = f"{left}{low:g}, {high:g}{right}"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        got = f"{_kind(value)}; {remedy or 'pass a float'}."
        raise TypeError(f"{name} must be a number in {interval}, got {got}")
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below and math.isfinite(value)):
        got = f"{value}; {remedy or 'choose one in this range'}."
        raise ValueError(f"{name} must be a finite number in {interval}, got {got}")
    return value


def check_bool(name: str, value: Any) -> bool:
    """Require True or False; 0 and 1 are refused."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {_kind(value)}; pass True or False.")
    return value


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Require one of a few strings."""
    listed = ", ".join(repr(choice) for choice in choices)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {listed}, got {_kind(value)}; pass such a string.")
    if value not in choices:
        raise ValueError(f"{name} must be one of {listed}, got {value!r}; choose one of these.")
    return value


def check_instance(name: str, value: Any, kinds: type | tuple[type, ...], remedy: str = "") -> Any:
    """Require an object of a class, or of one of several."""
    if not isinstance(value, kinds):
        classes = kinds if isinstance(kinds, tuple) else (kinds,)
        listed = " or ".join(cls.__name__ for cls in classes)
        remedy = remedy or f"pass a {classes[0].__name__}"
        raise TypeError(f"{name} must be of type {listed}, got {_kind(value)}; {remedy}.")
    return value


def check_callable(name: str, value: Any, what: str, remedy: str = "pass a function") -> Any:
    """Require something that can be called; `what` says as what ("a function of x")."""
    if not callable(value):
        raise TypeError(f"{name} must be {what}, got {_kind(value)}; {remedy}.")
    return value


def check_tensor(
    name: str,
    value: Any,
    shape: Sequence[int | str] | None = None,
    finite: bool = False,
    remedy: str = "",
) -> Tensor:
    """Require a tensor of floating-point numbers, of a shape if one is given.

    A string in `shape` stands for any size and names it ("N", "D").
    """
    expected = "" if shape is None else f" of shape ({', '.join(map(str, shape))})"
    if not isinstance(value, Tensor):
        remedy = remedy or f"pass torch.as_tensor({name}, dtype=torch.float32)"
        raise TypeError(f"{name} must be a torch tensor{expected}, got {_kind(value)}; {remedy}.")
    if not value.is_floating_point():
        got = f"{value.dtype}; {remedy or f'pass {name}.float()'}."
        raise TypeError(f"{name} must be a tensor of floating-point numbers, got dtype {got}")
    sizes = tuple(value.shape)
    if shape is not None and not (
        len(sizes) == len(shape)
        and all(isinstance(want, str) or want == size for want, size in zip(shape, sizes))
    ):
        got = f"{sizes}; {remedy or 'reshape it'}."
        raise ValueError(f"{name} must be a tensor{expected}, got shape {got}")
    bad = int((~torch.isfinite(value)).sum()) if finite else 0
    if bad:
        got = f"in {bad} of {value.numel()} entries; {remedy or 'drop or mask them'}."
        raise ValueError(f"{name} must be finite, got NaN or inf {got}")
    return value


def _numbers(name: str, value: Any) -> Tensor:
    """A float32 tensor of a tensor, an array, or nested lists of numbers."""
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
    """Require numbers of a shape whose first dimension may be missing: that is one row."""
    values = _numbers(name, value)
    if tuple(values.shape) == tuple(shape[1:]):
        values = values.unsqueeze(0)
    return check_tensor(name, values, shape, finite, remedy)


def check_observations(
    x: Any, shape: Sequence[int], name: str = "x", missing: bool = False
) -> Tensor:
    """Require at least one finite observation of a shape; returns `(B, *shape)`.

    With `missing`, NaN is allowed in part of an x of several axes, where it stands for what is
    missing, such as trials.
    """
    remedy = "pass one row of finite numbers for each of B observations"
    values = check_rows(name, x, ("B", *shape), remedy=remedy)
    _check_finite(name, values, missing, remedy)
    if len(values) == 0:
        raise ValueError(f"{name} must have B ≥ 1 rows, got shape {tuple(values.shape)}; {remedy}.")
    return values


def failed_rows(x: Tensor) -> Tensor:
    """Which x `(B, *shape)` are failures: infinite, or NaN where that does not stand for missing.

    NaN in part of an x of several axes encodes missing trials; in a vector it is a failure.
    """
    flat = x.flatten(1)
    nan = torch.isnan(flat).any(1) if x.ndim == 2 else torch.isnan(flat).all(1)
    return nan | torch.isinf(flat).any(1)


def _check_finite(name: str, x: Tensor, missing: bool, remedy: str) -> None:
    """Require finite x `(B, *shape)`, but for values that are missing."""
    if missing:
        failed = failed_rows(x).reshape(-1, *(x.ndim - 1) * [1])
        x = torch.where(failed, x, 0.0)
    check_tensor(name, x, finite=True, remedy=remedy)


def check_observation(x: Any, shape: Sequence[int], missing: bool = False) -> Tensor:
    """Require one finite observation, with or without dimensions of size one.

    None stands for a default that was not set. With `missing`, NaN is allowed as in
    `check_observations`. Returns `(1, *shape)`.
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
    values = values.reshape(1, *shape)
    _check_finite("x", values, missing, "")
    return values


def check_sample_shape(sample_shape: Any) -> torch.Size:
    """Require a tuple or list of positive ints; the empty one is one draw."""
    remedy = "pass (1000,) for 1,000 draws"
    for size in check_instance("sample_shape", sample_shape, (tuple, list), remedy):
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"sample_shape must be ints, got {_kind(sample_shape)}; {remedy}.")
        if size < 1:
            raise ValueError(f"sample_shape must be positive, got {sample_shape}; {remedy}.")
    return torch.Size(sample_shape)


def check_not_empty(name: str, values: Any, entry: str, remedy: str) -> None:
    """Require at least one entry of a tensor, list or dict."""
    if len(values) == 0:
        raise ValueError(f"{name} must have at least one {entry}, got none; {remedy}.")


def check_prior(prior: Any, methods: Sequence[str] = ("sample", "log_prob")) -> Any:
    """Require the methods of a prior."""
    missing = [method for method in methods if not callable(getattr(prior, method, None))]
    if missing:
        raise TypeError(
            f"prior must have {' and '.join(methods)}, got {type(prior).__name__} without "
            f"{' and '.join(missing)}; pass a torch distribution or what process_prior returns."
        )
    return prior

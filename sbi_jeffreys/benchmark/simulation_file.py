"""Simulations from a NumPy `.npz` file, with a clear error for every file that cannot be used.

| key | shape | |
|---|---|---|
| `theta` | `(N, D)` | parameters, one row for each simulation |
| `x` | `(N, K)` | outputs; row i was simulated from row i of theta |
| `x_o` | `(K,)` | optional: the observation |
| `low`, `high` | `(D,)` | optional, both or neither: the bounds of a uniform prior |
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["MIN_SIMULATIONS", "SimulationFile", "read_simulations"]

#: Fewer cannot be split into simulations to train on and pairs to judge by.
MIN_SIMULATIONS = 100
_REQUIRED, _BOUNDS = ("theta", "x"), ("low", "high")
_KNOWN = (*_REQUIRED, "x_o", *_BOUNDS)
_EXAMPLE = "write it with numpy.savez('FILE.npz', theta=theta, x=x)"
_LEAST_SPREAD = 10  # standard deviation of a column, in units of float32's spacing
_LEAST_SIZE = 1e-31  # of the largest value of a column: below 1e-38 float32 loses digits
_ROUNDING = 100  # in units of float64's spacing: a column that varies by less is constant
_IF_NOT_FINITE = {
    **dict.fromkeys(_REQUIRED, "drop these rows, of theta and x together"),
    "x_o": "x_o needs every output: complete it, or leave it out",
    **dict.fromkeys(_BOUNDS, "give finite bounds, or leave low and high out"),
}
_SHIFTED = {"theta": "theta, low and high", "x": "x and x_o"}  # together


@dataclass(frozen=True)
class SimulationFile:
    """What a file holds, checked.

    Attributes:
        theta: Parameters, `(N, D)`.
        x: Outputs, `(N, K)`.
        x_o: The observation, `(K,)`, if there is one.
        bounds: Lower and upper ends of a uniform prior, `(D,)` each, if there are any.
        unused: Other keys of the file.
    """

    theta: Tensor
    x: Tensor
    x_o: Tensor | None = None
    bounds: tuple[Tensor, Tensor] | None = None
    unused: tuple[str, ...] = ()


def read_simulations(path: Path) -> SimulationFile:
    """Read and check a file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: Naming the key, what was expected, what came, and the remedy.
    """
    arrays, unused = _arrays(path)
    missing = [key for key in _REQUIRED if key not in arrays]
    if missing:
        raise ValueError(
            f"{path}: expected the keys theta and x, got "
            f"{', '.join(sorted((*arrays, *unused))) or 'none'}; "
            f"add {' and '.join(missing)}: {_EXAMPLE}."
        )
    values = {key: _tensor(key, array) for key, array in arrays.items()}
    theta, x = (_matrix(key, values[key]) for key in _REQUIRED)
    _check_rows(theta, x)
    _check_columns(arrays, theta)
    bounds = _bounds(values, theta)
    x_o = _row("x_o", values["x_o"], x.shape[1], "x") if "x_o" in values else None
    return SimulationFile(theta, x, x_o, bounds, unused)


def _arrays(path: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The arrays of an `.npz` file that have a meaning, and other keys; nothing is unpickled."""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "nothing of that name"
        raise ValueError(f"{path}: expected a file in NumPy's .npz format, got {what}; {_EXAMPLE}.")
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(
                f"{path}: expected a file in NumPy's .npz format, got {_kind_of(path)}; {_EXAMPLE}."
            )
    arrays: dict[str, np.ndarray] = {}
    key = ""
    try:
        with np.load(path, allow_pickle=False) as archive:
            unused = tuple(sorted(set(archive.files) - set(_KNOWN)))
            for key in (key for key in _KNOWN if key in archive.files):
                arrays[key] = archive[key]
    # zipfile's RuntimeError says that a member is encrypted or compressed in another way.
    except (ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error):
            raise ValueError(
                f"{key}: expected an array of numbers, got Python objects, which are not read "
                f"because that could run code; pass numpy.stack(rows) as {key}."
            ) from error
        raise ValueError(
            f"{path}: expected a file in NumPy's .npz format, got one that cannot be "
            f"read{f' at {key}' if key else ''} ({error}); {_EXAMPLE}."
        ) from error
    return arrays, unused


def _kind_of(path: Path) -> str:
    """What a file that is no archive seems to be."""
    with path.open("rb") as file:
        start = file.read(6)
    if start == b"\x93NUMPY":
        return "a single array (.npy)"
    return "an empty file" if not start else f"one that begins with {start!r}"


def _tensor(key: str, values: np.ndarray) -> Tensor:
    """Finite real numbers, as float32."""
    if not isinstance(values, np.ndarray):  # numpy returns the bytes of other files in an archive
        raise ValueError(f"{key}: expected an array, got a file that is none; {_EXAMPLE}.")
    if values.dtype.kind not in "fiub":
        complex_ = values.dtype.kind == "c"
        remedy = "real and imaginary parts as columns" if complex_ else f"{key}.astype('float32')"
        raise ValueError(
            f"{key}: expected an array of real numbers, got dtype {values.dtype}; pass {remedy}."
        )
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    bad = ~np.isfinite(single)
    if bad.any():
        num = len(single) if single.ndim else 1
        rows = int(np.reshape(bad, (num, -1)).any(1).sum())
        few = f"{rows} of {num} {'rows' if single.ndim > 1 else 'entries'}"
        too_large = bool(np.isfinite(values[bad]).any())
        what = "numbers too large for float32" if too_large else "NaN or inf"
        remedy = "rescale them" if too_large else _IF_NOT_FINITE[key]
        raise ValueError(f"{key}: expected finite numbers, got {what} in {few}; {remedy}.")
    return torch.from_numpy(single)


def _matrix(key: str, values: Tensor) -> Tensor:
    """Require one row for each simulation and at least one column."""
    if values.ndim == 2 and values.shape[1] > 0:
        return values
    size = "D" if key == "theta" else "K"
    if values.ndim == 1:
        remedy = f"for a single column pass {key}.reshape(-1, 1)"
    elif key == "x" and values.ndim > 2:
        remedy = (
            "flatten every output, or use NPE_Jeffreys in Python with "
            "MainBuilder('nsf', embedding_net=…), which images and the like need"
        )
    elif values.ndim == 2:
        remedy = "pass at least one column"
    else:
        remedy = "pass one row for each simulation"
    raise ValueError(
        f"{key}: expected an array of shape (N, {size}), got {tuple(values.shape)}; {remedy}."
    )


def _check_rows(theta: Tensor, x: Tensor) -> None:
    if len(theta) != len(x):
        raise ValueError(
            f"theta and x: expected as many rows in both, got {len(theta)} and {len(x)}; row i of "
            "x must be the simulation of row i of theta."
        )
    if len(theta) < MIN_SIMULATIONS:
        raise ValueError(
            f"theta and x: expected at least {MIN_SIMULATIONS} simulations, half of them to judge "
            f"by, got {len(theta)}; run more simulations."
        )


def _check_columns(arrays: Mapping[str, np.ndarray], theta: Tensor) -> None:
    """Require columns that float32 resolves, and parameters that vary."""
    for key in _REQUIRED:
        wide = arrays[key].astype(np.float64)
        spread, size = wide.std(0), np.abs(wide).max(0)
        too_small = (size > 0) & (size < _LEAST_SIZE)
        if too_small.any():
            k = int(too_small.argmax())
            raise ValueError(
                f"{key}: expected columns that float32 resolves, got no value larger than "
                f"{size[k]:.2g} in column {k}; rescale column {k}, in {_SHIFTED[key]} alike."
            )
        rounded = (wide != wide.astype(np.float32)).any(0)  # whole numbers may not be
        spacing = np.spacing(size.astype(np.float32))
        coarse = rounded & (spread < _LEAST_SPREAD * spacing)
        coarse &= spread > _ROUNDING * np.spacing(size)
        if coarse.any():
            k = int(coarse.argmax())
            raise ValueError(
                f"{key}: expected columns that float32 resolves, got a standard deviation of "
                f"{spread[k]:.2g} around {wide[:, k].mean():.8g} in column {k}, where float32's "
                f"spacing is {spacing[k]:.2g}; subtract the mean of column {k}, from "
                f"{_SHIFTED[key]} alike."
            )
    constant = [k for k in range(theta.shape[1]) if bool((theta[:, k] == theta[0, k]).all())]
    if constant:
        raise ValueError(
            f"theta: expected parameters that vary, got the same value in every row of column "
            f"{constant[0]}; drop parameters that are fixed."
        )


def _row(key: str, values: Tensor, size: int, like: str) -> Tensor:
    """Require one value for each column of θ or x; a leading dimension of one is dropped."""
    flat = values[0] if values.ndim == 2 and len(values) == 1 else values
    if tuple(flat.shape) == (size,):
        return flat
    raise ValueError(
        f"{key}: expected an array of shape ({size},), as a row of {like}, got "
        f"{tuple(values.shape)}; pass one number for each column of {like}."
    )


def _bounds(values: Mapping[str, Tensor], theta: Tensor) -> tuple[Tensor, Tensor] | None:
    """The ends of the prior, with θ between them; None without any."""
    given = [key for key in _BOUNDS if key in values]
    if not given:
        return None
    if len(given) == 1:
        raise ValueError(
            f"low and high: expected both bounds of the prior or neither, got {given[0]} alone; "
            "add the other one."
        )
    low, high = (_row(key, values[key], theta.shape[1], "theta") for key in _BOUNDS)
    if not bool((low < high).all()):
        raise ValueError(
            f"low and high: expected low < high for every parameter, got {_listed(low)} and "
            f"{_listed(high)}; exchange them, or drop parameters that do not vary."
        )
    outside = ((theta < low) | (theta > high)).any(1)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"theta: expected parameters between low and high, got {int(outside.sum())} of "
            f"{len(theta)} rows outside, the first row {row}: {_listed(theta[row])}; correct the "
            "bounds, or drop these rows."
        )
    return low, high


def _listed(values: Tensor) -> str:
    """A row as text, shortened."""
    shown: list[Any] = [f"{float(value):.4g}" for value in values[:6]]
    return f"({', '.join(shown)}{', …' if len(values) > 6 else ''})"

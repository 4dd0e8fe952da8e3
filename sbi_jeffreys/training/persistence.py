"""A whole inference object in one file: simulations, networks, optimisers, random state.

The file is a zip archive of a readable header (format, package versions) and a pickle. The header
is apart because a pickle of other versions may not even load, and the error should say so. As with
every pickle, loading runs code: load only files you trust.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import platform
import tempfile
import warnings
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["FORMAT_VERSION", "is_picklable", "load", "place_step_counters", "save"]

FORMAT_VERSION = 1
_FORMAT = "sbi_jeffreys inference"
_HEADER, _PAYLOAD = "header.json", "inference.pt"
_PACKAGES = ("sbi_jeffreys", "sbi", "torch")


def _versions() -> dict[str, str]:
    """Versions of what a pickle depends on."""
    return {name: metadata.version(name) for name in _PACKAGES} | {
        "python": platform.python_version()
    }


def is_picklable(obj: Any) -> bool:
    """Whether `obj` can be pickled, by trying; closures and lambdas cannot."""
    try:
        pickle.dumps(obj)
    except Exception:  # whatever a user's __reduce__ raises
        return False
    return True


def save(inference: Any, path: str | os.PathLike[str]) -> None:
    """Write `inference` to `path`, complete or not at all.

    Args:
        inference: The object.
        path: File to write; an existing one is replaced.

    Raises:
        TypeError: If something in it cannot be pickled.
    """
    path = Path(path)
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            # sbi warns of what loading loses; `NPE_Jeffreys.save` documents it.
            warnings.filterwarnings("ignore", message="When the inference object is pickled")
            torch.save(inference, buffer)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"inference cannot be saved to {path}: {error}. Everything in it must be picklable: "
            "define priors, proxies' functions and embedding nets at the top level of a module."
        ) from error
    header = {"format": _FORMAT, "format_version": FORMAT_VERSION, "packages": _versions()}
    # In the same folder, so that the rename is atomic: a reader sees the old file or the new one.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr(_HEADER, json.dumps(header, indent=1))
                archive.writestr(_PAYLOAD, buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str], device: str | None = None) -> Any:
    """Read what `save` wrote.

    Args:
        path: The file.
        device: Where its tensors go; None: where they were.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is something else, damaged, of a newer format, or of package versions
            that cannot be read here.
    """
    path = Path(path)
    header, payload = _read(path)
    version = header.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version!r}, this sbi_jeffreys reads up to "
            f"{FORMAT_VERSION}: it was saved by a newer one. Install what it was saved with: "
            f"{_listed(header.get('packages'))}."
        )
    try:
        return torch.load(io.BytesIO(payload), map_location=device, weights_only=False)
    except Exception as error:  # unpickling raises whatever the classes' changed code raises
        raise ValueError(
            f"{path} cannot be read: {type(error).__name__}: {error}. It was saved with "
            f"{_listed(header.get('packages'))}; here are {_listed(_versions())}. Install what it "
            "was saved with, or, if it came from a CUDA machine, pass device='cpu'."
        ) from error


def place_step_counters(optimizer: Optimizer) -> None:
    """Put Adam's step counters back on the CPU, where it wants them unless fused.

    Loading onto a device moves every tensor there.
    """
    for group in optimizer.param_groups:
        if group.get("fused") or group.get("capturable"):
            continue
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].cpu()


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and pickle of a file, both checked against the archive's checksums."""
    remedy = "Pass a file written by NPE_Jeffreys.save; if it was one, it is damaged: save it anew."
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}. {remedy}")
    try:
        with zipfile.ZipFile(path) as archive:
            header, payload = json.loads(archive.read(_HEADER)), archive.read(_PAYLOAD)
    except (zipfile.BadZipFile, KeyError, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not a saved inference object ({error}). {remedy}") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a saved inference object (other format). {remedy}")
    return header, payload


def _listed(packages: Any) -> str:
    if not isinstance(packages, dict):
        return "unknown versions"
    return ", ".join(f"{name} {version}" for name, version in packages.items())

"""A whole inference object in one file, and its weights in a form that runs no code when read.

The file is a zip archive of a readable header (format, package versions), a pickle of everything,
and the tensors that a posterior needs (simulations and the main's weights). The header is separate
so that the error can name the versions if the pickle does not load. As with every pickle, `load`
runs code: load only files you trust. `load_tensors` reads the tensors alone.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import platform
import warnings
import zipfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sbi_jeffreys._checks import warn

__all__ = ["FORMAT_VERSION", "is_picklable", "load", "load_tensors", "place_step_counters", "save"]

FORMAT_VERSION = 3
_FORMAT = "sbi_jeffreys inference"
_HEADER, _PAYLOAD, _TENSORS = "header.json", "inference.pt", "tensors.pt"
_PACKAGES = ("sbi_jeffreys", "sbi", "torch")
_REMEDY = "Pass a file written by NPE_Jeffreys.save; if it was one, it is damaged: save it anew."


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


def save(inference: Any, path: str | os.PathLike[str], tensors: dict[str, Any]) -> None:
    """Write an object, and the tensors for `load_tensors`, to `path`, complete or not at all.

    A new file gets the permissions that the umask leaves, an existing one keeps its own, and a
    symbolic link stays a link to the file that is replaced. Where something in the object cannot be
    pickled, a TypeError says so.
    """
    try:
        with warnings.catch_warnings():
            # sbi warns of what loading loses; `NPE_Jeffreys.save` documents it.
            warnings.filterwarnings("ignore", message="When the inference object is pickled")
            payload = _dumped(inference)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"inference cannot be saved to {path}: {error}. Everything in it must be picklable: "
            "define priors, proxies' functions and embedding nets at the top level of a module."
        ) from error
    header = {"format": _FORMAT, "format_version": FORMAT_VERSION, "packages": _versions()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(_HEADER, json.dumps(header, indent=1))
        archive.writestr(_PAYLOAD, payload)
        archive.writestr(_TENSORS, _dumped(tensors))
    _replace(Path(os.path.realpath(path)), buffer.getvalue())


def _dumped(obj: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def _replace(path: Path, content: bytes) -> None:
    """Put `content` into the file at `path` in one step: readers see the old file or the new one.

    The temporary file is in the same folder, so that the renaming is atomic. Where the system
    allows it, the file has no name until it is complete: a killed process leaves nothing behind.
    """
    umask = os.umask(0)
    os.umask(umask)
    mode = path.stat().st_mode & 0o7777 if path.exists() else 0o666 & ~umask
    named = path.parent / f".{path.name}.{os.getpid()}"
    named.unlink(missing_ok=True)
    handle = _temporary(named)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(handle, mode)
            os.fsync(handle)
            if not named.exists():
                _give_name(handle, named)
        os.replace(named, path)
    except BaseException:
        named.unlink(missing_ok=True)
        raise


def _temporary(path: Path) -> int:
    """Descriptor of a new file: without a name where the system allows it, otherwise at `path`."""
    flag = getattr(os, "O_TMPFILE", None)
    if flag is not None and os.path.isdir("/proc/self/fd"):
        with suppress(OSError):  # a file system without such files, or no permission
            return os.open(path.parent, flag | os.O_RDWR, 0o600)
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)


def _give_name(handle: int, path: Path) -> None:
    """Link an open file without a name to a path."""
    folder = os.open("/proc/self/fd", os.O_RDONLY)
    try:  # with a folder's descriptor, Python follows the link under /proc
        os.link(str(handle), path, src_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def load(path: str | os.PathLike[str], device: str | None = None) -> Any:
    """Read what `save` wrote, onto a device if one is given; warn of other package versions."""
    header, payload = _read(Path(path), _PAYLOAD)
    try:
        loaded = torch.load(io.BytesIO(payload), map_location=device, weights_only=False)
    except Exception as error:  # unpickling raises whatever the classes' changed code raises
        raise ValueError(
            f"{path} cannot be read: {type(error).__name__}: {error}. It was saved with "
            f"{_listed(header.get('packages'))}; this environment has "
            f"{_listed(_versions())}. Install what it "
            "was saved with, or, if it came from a CUDA machine, pass device='cpu'."
        ) from error
    if header.get("packages") != _versions():
        warn(
            f"{path} was saved with {_listed(header.get('packages'))}; this environment has "
            f"{_listed(_versions())}. Check a posterior against a known result, or install what it "
            "was saved with.",
        )
    return loaded


def load_tensors(path: str | os.PathLike[str], device: str) -> dict[str, Any]:
    """The tensors of a saved inference object, without running code from the file."""
    _, content = _read(Path(path), _TENSORS)
    try:
        return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} holds no readable weights ({type(error).__name__}). {_REMEDY}"
        ) from error


def place_step_counters(optimizer: Optimizer) -> None:
    """Move Adam's step counters to the CPU after loading onto a device, unless Adam is fused."""
    for group in optimizer.param_groups:
        if group.get("fused") or group.get("capturable"):
            continue
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].cpu()


def _read(path: Path, part: str) -> tuple[dict[str, Any], bytes]:
    """Header and one part of a file, both checked against the archive's checksums."""
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}. {_REMEDY}")
    try:
        with zipfile.ZipFile(path) as archive:
            header = json.loads(archive.read(_HEADER))
            fault = _fault(header)
            content = b"" if fault else archive.read(part)
    except Exception as error:  # damaged archives raise NotImplementedError, zlib.error, and more
        raise ValueError(f"{path} is not a saved inference object ({error}). {_REMEDY}") from error
    if fault:
        raise ValueError(f"{path} {fault}")
    return header, content


def _fault(header: Any) -> str:
    """Why a file with this header cannot be read here; empty if it can."""
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        return f"is not a saved inference object (other format). {_REMEDY}"
    version = header.get("format_version")
    if type(version) is int and version == FORMAT_VERSION:
        return ""
    return (
        f"has format version {version!r}, this sbi_jeffreys reads {FORMAT_VERSION}. Install what "
        f"it was saved with: {_listed(header.get('packages'))}."
    )


def _listed(packages: Any) -> str:
    if not isinstance(packages, dict):
        return "unknown versions"
    return ", ".join(f"{name} {version}" for name, version in packages.items())

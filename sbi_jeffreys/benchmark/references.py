"""Reference posterior samples, cached on disk by what they depend on."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from .tasks import Task

# Part of every cache key: raise it whenever a task or a sampler changes its distribution.
REFERENCE_VERSION = 1


def reference_samples(
    task: Task, x: Tensor, num_samples: int, seed: int = 0, cache_dir: str | Path | None = None
) -> Tensor:
    """Samples of p(θ|x), from the cache where they have been drawn before.

    The global random state is left as it was.

    Args:
        task: The task.
        x: One observation, `(dim_x,)` or `(1, dim_x)`.
        num_samples: How many samples.
        seed: Seed of the reference sampler.
        cache_dir: Where to keep the samples. By default the environment variable
            `SBI_JEFFREYS_CACHE`, or `~/.cache/sbi_jeffreys` where that is not set.

    Returns:
        `(num_samples, D)`, float32.

    Raises:
        ValueError: If `num_samples` is not positive, or x does not fit the task.
    """
    if num_samples < 1:
        raise ValueError(
            f"num_samples: expected a positive count, got {num_samples}; pass e.g. 1000."
        )
    task.check_observation(x)
    path = _directory(cache_dir) / f"{task.name}-{_key(task, x, num_samples, seed)}.pt"
    samples = _load(path, (num_samples, task.dim_theta))
    if samples is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            samples = task.sample_reference(x, num_samples).detach().to(torch.float32).cpu()
        _store(samples, path)
    return samples


def _directory(cache_dir: str | Path | None) -> Path:
    if cache_dir is None:
        cache_dir = os.environ.get("SBI_JEFFREYS_CACHE") or Path.home() / ".cache/sbi_jeffreys"
    return Path(cache_dir).expanduser()


def _key(task: Task, x: Tensor, num_samples: int, seed: int) -> str:
    """Hash of all that the samples depend on."""
    values = x.detach().reshape(-1).to("cpu", torch.float64).contiguous().numpy().tobytes()
    head = f"{REFERENCE_VERSION}|{task.name}|{num_samples}|{seed}|".encode()
    return hashlib.sha256(head + values).hexdigest()[:24]


def _digest(samples: Tensor) -> str:
    return hashlib.sha256(samples.contiguous().numpy().tobytes()).hexdigest()


def _load(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """The cached samples, or None where there are none that can be trusted."""
    if not path.exists():
        return None
    try:
        content = torch.load(path, weights_only=True)
        samples, digest = content["samples"], content["digest"]
        if tuple(samples.shape) != shape or samples.dtype != torch.float32:
            raise ValueError(f"shape {tuple(samples.shape)} and {samples.dtype}")
        # A flipped bit in the payload still unpickles: only the digest tells.
        if _digest(samples) != digest:
            raise ValueError("its digest does not match")
    except Exception as error:  # any damage, of whatever kind, means: draw again
        # torch's own message would suggest to load the file unsafely.
        reason = str(error) if isinstance(error, ValueError) else type(error).__name__
        warnings.warn(
            f"The cached reference {path} is corrupt ({reason}); it is drawn again.", stacklevel=3
        )
        return None
    return samples


def _store(samples: Tensor, path: Path) -> None:
    """Write beside the target and rename, so that no reader ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"samples": samples, "digest": _digest(samples)}, file)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

"""Reference posterior samples, cached on disk under everything that they depend on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from torch import Tensor

from sbi_jeffreys._checks import warn

from .tasks import Task

# Part of every cache key. Raise it whenever a task or a sampler changes its distribution.
REFERENCE_VERSION = 1


def reference_samples(
    task: Task, x: Tensor, num_samples: int, seed: int = 0, cache_dir: str | Path | None = None
) -> Tensor:
    """Samples of p(θ|x), from the cache (`joblib.Memory`) where they have been drawn before.

    The global random state is restored. A damaged cache entry is redrawn with a warning;
    where the cache cannot be written, samples are drawn without it.

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
    observed = task.check_observation(x).numpy()
    default = os.environ.get("SBI_JEFFREYS_CACHE") or Path.home() / ".cache/sbi_jeffreys"
    memory = joblib.Memory(Path(cache_dir or default).expanduser(), verbose=0)
    draw: Any = memory.cache(_draw, ignore=["task"])
    arguments = (task, task.name, observed, num_samples, seed, REFERENCE_VERSION)
    entry = draw.call_and_shelve(*arguments)  # draws where nothing is cached yet
    try:
        samples, digest = entry.get()
        intact = joblib.hash(samples) == digest  # a flipped bit in the payload still unpickles
    except Exception:  # any damage, of whatever kind
        intact = False
    if not intact:
        warn(
            f"The cached reference {entry.args_id} of {task.name} in {memory.location} cannot be "
            "read back; it is drawn again."
        )
        entry.clear()
        samples, _ = draw(*arguments)
    return torch.from_numpy(samples)


def _draw(
    task: Task, name: str, observed: np.ndarray, num_samples: int, seed: int, version: int
) -> tuple[np.ndarray, str]:
    """Samples and their digest; the arguments but for the task itself are the cache's key."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        samples = task.sample_reference(torch.from_numpy(observed), num_samples)
    drawn = samples.detach().to(torch.float32).cpu().numpy()
    return drawn, str(joblib.hash(drawn))

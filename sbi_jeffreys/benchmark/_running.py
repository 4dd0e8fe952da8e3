"""What every benchmark run needs: private randomness, silence, a meter for time and memory."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import io
import math
import os
import random
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = [
    "CommandError",
    "Measurement",
    "NoTracker",
    "derive_seed",
    "measured",
    "one_thread",
    "quiet",
    "seeded",
]


class CommandError(ValueError):
    """A command cannot start; the message says why and what to change. Exit code 2."""


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2³¹) that depends on all parts and on nothing else (not on Python's hash)."""
    text = "|".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 2**31


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block on its own random streams (torch, NumPy, Python) and restore the caller's.

    sbi's slice sampler seeds NumPy's global generator, so torch's alone would not do.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


@contextmanager
def quiet(silent: bool = True) -> Iterator[None]:
    """Drop what sbi prints and warns about; nothing happens unless `silent`."""
    if not silent:
        yield
        return
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, so that timings do not depend on how many workers there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class NoTracker:
    """A tracker of sbi's that keeps nothing: without it every training writes a folder."""

    log_dir: str | None = None

    def log_metric(self, name: str, value: float, step: int | None = None) -> None:
        """Ignore one value."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Ignore several values."""

    def log_params(self, params: dict[str, Any]) -> None:
        """Ignore parameters."""

    def add_figure(self, name: str, figure: Any, step: int | None = None) -> None:
        """Ignore a figure."""

    def flush(self) -> None:
        """Nothing to write."""


@dataclass
class Measurement:
    """What a block cost.

    Attributes:
        seconds: Wall time.
        cpu_seconds: Processor time of this process; steadier than wall time on a shared machine.
        peak_mib: Growth of the resident set over its size at the block's start, at its peak, in
            MiB; NaN where the system does not tell. Blocks that come later in a process find
            libraries and arenas in place already, and grow less.
        resident_mib: The resident set at its peak, all of it: what the machine must have.
    """

    seconds: float = float("nan")
    cpu_seconds: float = float("nan")
    peak_mib: float = float("nan")
    resident_mib: float = float("nan")


@contextmanager
def measured() -> Iterator[Measurement]:
    """Measure a block: `with measured() as m: …`, then read `m.seconds` and so on.

    The peak is the kernel's high-water mark, reset at the start (Linux), so that it belongs to the
    block although workers are reused. What earlier blocks freed is first given back to the system,
    else it would be used again unseen.
    """
    result = Measurement()
    before = _resident_mib("VmRSS") if _reset_peak() else float("nan")
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield result
    finally:
        result.seconds = time.perf_counter() - wall
        result.cpu_seconds = time.process_time() - cpu
        peak = _resident_mib("VmHWM")
        result.peak_mib = max(0.0, peak - before)
        result.resident_mib = float("nan") if math.isnan(before) else peak  # not reset: not ours


def _reset_peak() -> bool:
    """Set the kernel's high-water mark to the present size; False where that cannot be done."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        with open(f"/proc/{os.getpid()}/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _resident_mib(field: str) -> float:
    """A field of /proc/…/status in MiB, NaN where there is none."""
    try:
        with open(f"/proc/{os.getpid()}/status") as file:
            for line in file:
                if line.startswith(f"{field}:"):
                    return int(line.split()[1]) / 1024
    except OSError:
        pass
    return float("nan")

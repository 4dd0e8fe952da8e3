"""What every benchmark run needs: private randomness, silence, a meter for time and memory."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import io
import math
import random
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sbi_jeffreys._checks import JeffreysWarning


class CommandError(ValueError):
    """A command cannot start; the message says why and what to change. The exit code is 2."""


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2³¹) that depends on all parts and on nothing else (not on Python's hash)."""
    text = "|".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 2**31


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block on its own random streams (torch, NumPy, Python) and restore the caller's.

    NumPy's global generator is among them because sbi's slice sampler seeds it.
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
def quiet(silent: bool = True, *, ours: bool = False) -> Iterator[None]:
    """Drop what sbi prints, its bars and warnings; do nothing unless `silent`.

    With `ours`, each `JeffreysWarning` is given when the block ends.
    """
    if not silent:
        yield
        return
    dropped = io.StringIO()
    with (
        redirect_stdout(dropped),
        redirect_stderr(dropped),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("ignore")
        if ours:
            warnings.simplefilter("always", JeffreysWarning)
        yield
    for one in caught:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def say(text: str, silent: bool) -> None:
    """Print what a command is doing, apart from its results, unless `silent`."""
    if not silent:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, so that timings do not depend on the number of workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass
class Measurement:
    """What a block cost.

    Attributes:
        seconds: Wall time.
        cpu_seconds: Processor time of this process; steadier than wall time on a shared machine.
        peak_mib: Peak growth of the resident set over its size at the block's start, in MiB; NaN
            where the system does not report it. Later blocks of a process grow less, because
            libraries and arenas are in place already.
        resident_mib: The whole resident set at its peak, in MiB: what the machine must have.
    """

    seconds: float = math.nan
    cpu_seconds: float = math.nan
    peak_mib: float = math.nan
    resident_mib: float = math.nan


@contextmanager
def measured() -> Iterator[Measurement]:
    """Measure a block: `with measured() as m: …`, then read `m.seconds` and so on.

    The peak is the kernel's high-water mark, which is reset at the start (Linux), so that it
    belongs to the block although workers are reused. Memory that earlier blocks freed is first
    returned to the system, because reusing it would not show.
    """
    result = Measurement()
    before = _resident_mib("VmRSS") if _reset_peak() else math.nan
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield result
    finally:
        result.seconds = time.perf_counter() - wall
        result.cpu_seconds = time.process_time() - cpu
        if not math.isnan(before):
            result.resident_mib = _resident_mib("VmHWM")
            result.peak_mib = max(0.0, result.resident_mib - before)


def _reset_peak() -> bool:
    """Set the kernel's high-water mark to the present size; False where that is impossible."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def _resident_mib(field: str) -> float:
    """A field of /proc/self/status, in MiB; NaN where it does not exist."""
    with suppress(OSError):
        if found := re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.M):
            return int(found[1]) / 1024
    return math.nan

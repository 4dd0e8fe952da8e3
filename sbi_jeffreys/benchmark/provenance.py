"""Where a result comes from: versions, machine, command."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["machine", "versions"]

_PACKAGES = ("torch", "sbi", "sbi_jeffreys", "numpy", "scikit-learn")


@functools.lru_cache(maxsize=1)
def versions() -> dict[str, Any]:
    """Versions of Python and of what the results depend on; the commit where there is one."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["git_commit"] = _git("rev-parse", "HEAD")
    # Untracked files do not count: result folders are untracked.
    changed = _git("status", "--porcelain", "--untracked-files=no")
    found["git_modified"] = None if changed is None else bool(changed)
    return found


@functools.lru_cache(maxsize=1)
def machine() -> dict[str, Any]:
    """Processor, cores and torch's threads of the process that asks."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def command() -> str:
    """The command line of this process."""
    return " ".join(["python", *sys.argv])


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _git(*arguments: str) -> str | None:
    """Output of git in the package's folder, None outside a repository of this package."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

"""Where results come from: versions, machine, settings, commands."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["command", "machine", "summary_lines", "versions"]

_SHOWN = ("python", "torch", "sbi", "sbi_jeffreys", "git_commit", "cpu", "cores", "threads")
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


def summary_lines(records: Iterable[Mapping[str, Any]]) -> str:
    """Versions, machine, settings and commands of records, as a Markdown list.

    More than one value of anything is shown: results of several commits say so. Commands, of which
    a run in pieces has many, are folded away.
    """
    found: dict[str, set[str]] = {}
    commands: set[str] = set()
    for record in records:
        origin = record.get("provenance", {})
        for key, value in {**{k: origin.get(k) for k in _SHOWN}, **record["settings"]}.items():
            found.setdefault(key, set()).add(str(value))
        commands.add(str(record.get("command", origin.get("command"))))
    lines = [f"- {key}: {', '.join(sorted(values))}" for key, values in found.items()]
    listed = "\n".join(sorted(commands))
    folded = f"<details><summary>Commands ({len(commands)})</summary>"
    return "\n".join([*lines, "", folded, "", f"```\n{listed}\n```", "", "</details>"])


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

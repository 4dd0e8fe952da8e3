"""The origin of results: versions, machine, settings, commands."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_SHOWN = ("python", "torch", "sbi", "sbi_jeffreys", "git_commit", "cpu", "cores", "threads")
_PACKAGES = ("torch", "sbi", "sbi_jeffreys", "numpy", "scikit-learn")


@functools.lru_cache(maxsize=1)
def versions() -> dict[str, Any]:
    """Versions of Python and of the packages that results depend on; the commit if there is one."""
    found: dict[str, Any] = {"python": platform.python_version(), **dict.fromkeys(_PACKAGES)}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    found["git_commit"] = _git("rev-parse", "HEAD")
    # Untracked files do not count: result folders are untracked.
    changed = _git("status", "--porcelain", "--untracked-files=no")
    found["git_modified"] = None if changed is None else bool(changed)
    return found


@functools.lru_cache(maxsize=1)
def machine() -> dict[str, Any]:
    """Processor and cores of this machine, and torch's threads in this process."""
    model = None
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = re.search(r"^model name\s*:\s*(.*)$", text, re.M)
    return {
        "cpu": model[1] if model else platform.processor() or "unknown",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def command() -> str:
    """The command line of this process."""
    return " ".join(["python", *sys.argv])


def summary_lines(records: Iterable[Mapping[str, Any]]) -> str:
    """Versions, machine, settings and commands of records, as a Markdown list.

    All values are listed where records differ, such as several commits. The commands, which are
    many if a run was interrupted, are folded.
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


def _git(*arguments: str) -> str | None:
    """Output of git in the package's folder, or None where that is no repository."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), *arguments]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else None
    return None

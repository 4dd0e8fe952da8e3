"""Fetch sbi's own tests, which only its source distribution has, into a cache outside the tree.

Only `tests/` and `pyproject.toml` (the pytest configuration, which belongs to the tests) are kept:
the distribution's `sbi/` would shadow the installed one.

    python tests/host/fetch_sbi_tests.py [VERSION]    prints the folder
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

KEPT = ("tests", "pyproject.toml")


def cache_folder() -> Path:
    """Return the folder that holds the fetched tests of all versions."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sbi_jeffreys"


def download(version: str, folder: Path) -> Path:
    """Download the source distribution of sbi into `folder` and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", ":all:", "--dest", str(folder), f"sbi=={version}"]
    # Without dependencies nothing but sbi comes, and pip reads its metadata but builds no wheel.
    done = subprocess.run(command, capture_output=True, text=True)
    archives = sorted(folder.glob("sbi-*.tar.gz"))
    if done.returncode or len(archives) != 1:
        raise RuntimeError(
            f"could not download the source distribution of sbi {version}. Check that this "
            f"version exists (`pip index versions sbi`) and that the index answers; pip said:\n"
            f"{done.stderr.strip()}"
        )
    return archives[0]


def kept_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield what to extract, without the leading `sbi-<version>/`."""
    for member in archive:
        _, _, inner = member.name.partition("/")
        if inner.split("/")[0] in KEPT:
            member.name = inner
            yield member


def fetch(version: str, cache: Path | None = None) -> Path:
    """Return the folder with `tests/` of sbi `version`, after fetching it where needed.

    Args:
        version: a released version of sbi.
        cache: where to keep it; by default `~/.cache/sbi_jeffreys`.
    """
    cache = cache or cache_folder()
    target = cache / f"sbi-tests-{version}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    # Within the cache, so that the rename is atomic: a folder with the final name is complete.
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        extracted = Path(temporary) / "extracted"
        with tarfile.open(download(version, Path(temporary))) as archive:
            archive.extractall(extracted, members=kept_members(archive), filter="data")
        if not (extracted / "tests").is_dir():
            raise RuntimeError(
                f"the source distribution of sbi {version} has no tests/: choose a version that "
                "ships them, or fetch the tests from sbi's repository at its tag."
            )
        try:
            extracted.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was first, with the same files
                raise
    return target


if __name__ == "__main__":
    print(fetch(sys.argv[1] if len(sys.argv) > 1 else metadata.version("sbi")))

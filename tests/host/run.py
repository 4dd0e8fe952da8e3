"""Run sbi's own tests against the class that takes the place of sbi's `NPE`.

    python tests/host/run.py                        the unmarked tests of the files in files.txt
    python tests/host/run.py --slow                 every test of these files (hours)
    python tests/host/run.py --sbi-version 0.26.1   against another sbi, in a throwaway environment
    python tests/host/run.py --sbi PATH             our tests and sbi's, against a checkout of sbi

See README.md, beside this file.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from importlib import metadata, util
from pathlib import Path

from fetch_sbi_tests import fetch

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
# What sbi's conftest and the listed files import. torchtestcase would bring another torch.
REQUIRED = ("pytest-harvest", "pytest-mock", "pandas", "pytest-xdist")
REQUIRED_BARE = ("torchtestcase",)
MODULES = ("pytest_harvest", "pytest_mock", "pandas", "xdist", "torchtestcase")
UNMARKED = "not slow and not gpu and not mcmc and not benchmark"
ALL = "not gpu and not benchmark"


def install_hint() -> str:
    """Return the commands that install what the tests need beside sbi."""
    return f"pip install {' '.join(REQUIRED)}\npip install --no-deps {' '.join(REQUIRED_BARE)}"


def missing_modules() -> list[str]:
    """Return the modules that the tests import and this environment lacks."""
    return [name for name in MODULES if util.find_spec(name) is None]


def listed(slow: bool, checkout: bool = False) -> tuple[list[str], list[str]]:
    """Return the tests to run and those of them to leave out, as files.txt lists them.

    Args:
        slow: whether time does not matter: then the files are taken whole.
        checkout: whether they come from a checkout of sbi, which has those of files_main.txt too.
    """
    texts = [(HERE / name).read_text() for name in ("files.txt", "files_main.txt")[: 1 + checkout]]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    entries = [line for line in lines if line and not line.startswith(("#", "-"))]
    if slow:
        return list(dict.fromkeys(entry.split("::")[0] for entry in entries)), []
    return entries, [line.removeprefix("-").strip() for line in lines if line.startswith("-")]


def in_fetched(root: Path, selected: list[str], checkout: bool = False) -> list[str]:
    """Return the selected files or node ids as absolute paths, after checking that they exist.

    In a checkout of another version, what does not exist there is left out, and named.
    """
    absent = [name for name in selected if not _exists(root, name)]
    if absent and checkout:
        print(f"not among sbi's tests in {root}, left out: {', '.join(absent)}", flush=True)
        selected = [name for name in selected if name not in absent]
    elif absent:
        raise SystemExit(
            f"not among sbi's tests in {root}: {', '.join(absent)}. Correct tests/host/files.txt "
            "or the names given, written like tests/sbc_test.py."
        )
    return [str(root / name) for name in selected]


def _exists(root: Path, name: str) -> bool:
    """Whether a file or node id is there: the file, and in it the test's name."""
    file, *inner = name.partition("[")[0].split("::")
    path = root / file
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8")
    return all(re.search(rf"^ *(async )?(def|class) {part}\b", text, re.M) for part in inner)


def pytest_arguments(root: Path, options: argparse.Namespace) -> list[str]:
    """Return the arguments for pytest."""
    arguments = ["-p", "sbi_substitute", "--rootdir", str(root), "-c", str(root / "pyproject.toml")]
    arguments += ["-p", "no:cacheprovider", "-m", ALL if options.slow else UNMARKED]
    # The tests belong to sbi: report failures, not their warnings and expected failures.
    arguments += ["-r", "fEX", "--disable-warnings"]
    exceptions = HERE / ("exceptions_main.txt" if options.sbi else "exceptions.txt")
    arguments += ["--host-exceptions", str(exceptions)]
    arguments += ["--host-costs", str(options.costs)]
    if options.workers > 1:
        arguments += ["-n", str(options.workers)]
    if options.tests:
        return [*arguments, "--host-partial", *in_fetched(root, options.tests, bool(options.sbi))]
    selected, leave_one_out = listed(options.slow, bool(options.sbi))
    for node_id in leave_one_out:
        arguments += ["--deselect", node_id]
    return arguments + in_fetched(root, selected, bool(options.sbi))


def run_pytest(python: str, arguments: list[str], first: tuple[str, ...] = ()) -> int:
    """Run pytest in an empty folder, where sbi's trackers leave their logs; return its status.

    Args:
        python: the interpreter.
        arguments: of pytest.
        first: folders that come before everything installed, such as a checkout of sbi.
    """
    # A checkout, the plugin, then the user's own.
    paths = [*first, str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # One thread a process: the networks are tiny, and results do not depend on the machine's cores.
    environment["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="sbi-tests-") as scratch:
        command = [python, "-m", "pytest", *arguments]
        return subprocess.run(command, cwd=scratch, env=environment).returncode


def throwaway_environment(folder: Path, version: str) -> str:
    """Create an environment with sbi `version` and this package; return its interpreter.

    The package comes by path, without its own bound on sbi: going beyond it is the purpose.
    """
    venv.create(folder, with_pip=True, symlinks=True)
    python = str(folder / "bin" / "python")
    torch = metadata.version("torch").partition("+")[0]
    constraint = folder / "constraint.txt"
    constraint.write_text(f"torch=={torch}\n")
    install = [python, "-m", "pip", "install", "--quiet", "-c", str(constraint)]
    subprocess.run([*install, f"sbi=={version}", "pytest", *REQUIRED], check=True)
    subprocess.run([*install, "--no-deps", *REQUIRED_BARE], check=True)
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    (Path(site) / "sbi_jeffreys_by_path.pth").write_text(f"{REPOSITORY}\n")
    return python


def run_against_checkout(checkout: Path, options: argparse.Namespace) -> int:
    """Run our own tests, then sbi's, with the `sbi/` of a checkout in place of the installed one.

    Args:
        checkout: a folder with `sbi/` and `tests/`.
        options: of the command line.
    """
    for name in ("sbi", "tests"):
        if not (checkout / name).is_dir():
            raise SystemExit(f"--sbi {checkout}: expected a checkout of sbi, but it has no {name}/")
    first = (str(checkout), str(REPOSITORY))
    ours = [str(REPOSITORY / "tests"), "--rootdir", str(REPOSITORY), "-p", "no:cacheprovider", "-q"]
    ours += ["-c", str(REPOSITORY / "pyproject.toml"), "--disable-warnings"]
    ours += ["-n", str(options.workers)] if options.workers > 1 else []
    status = 0 if options.tests else run_pytest(sys.executable, ours, first)
    theirs = run_pytest(sys.executable, pytest_arguments(checkout, options), first)
    outcome = "not run, as tests of sbi were named" if options.tests else f"exit status {status}"
    print(f"Our tests against {checkout}: {outcome}", flush=True)
    return status or theirs


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description="Run sbi's own tests against the class that takes the place of NPE."
    )
    parser.add_argument("tests", nargs="*", help="files or node ids; default: those in files.txt")
    parser.add_argument("--slow", action="store_true", help="with the slow and mcmc tests (hours)")
    parser.add_argument("--sbi-version", help="run against this sbi, in a throwaway environment")
    parser.add_argument("--sbi", type=Path, help="a checkout of sbi: run our tests and sbi's there")
    parser.add_argument("-n", "--workers", type=int, default=1, help="processes (pytest-xdist)")
    parser.add_argument("--costs", type=int, default=0, help="list the N most expensive tests")
    return parser.parse_args(arguments)


def main() -> int:
    """Fetch, run, and return the exit status of pytest."""
    options = parse()
    if options.sbi_version:
        with tempfile.TemporaryDirectory(prefix="sbi-env-") as folder:
            python = throwaway_environment(Path(folder), options.sbi_version)
            return run_pytest(python, pytest_arguments(fetch(options.sbi_version), options))
    if missing := missing_modules():
        raise SystemExit(f"sbi's tests need {', '.join(missing)}; install with\n{install_hint()}")
    if options.sbi:
        return run_against_checkout(options.sbi.resolve(), options)
    return run_pytest(sys.executable, pytest_arguments(fetch(metadata.version("sbi")), options))


if __name__ == "__main__":
    sys.exit(main())

"""Pytest plugin: run sbi's own tests with another class in the place of `NPE` and `NPE_C`.

Loaded with `-p sbi_substitute` by `run.py`. Before collection it puts a test-sized subclass of the
class named by `SBI_JEFFREYS_SUBSTITUTE` under every name that sbi's tests import `NPE_C` by. After
collection it marks the tests listed in the exceptions file as expected to fail.

The run fails, beside the failures of single tests, when

- an exception is listed for a test that does not exist (it would hide nothing and mislead), or
- the tests passed without training the substitute once (they would have tested sbi, not us).

Under pytest-xdist the workers do the work and hand their notes to the controller, which reports.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sbi

SUBSTITUTE_VARIABLE = "SBI_JEFFREYS_SUBSTITUTE"
DEFAULT_SUBSTITUTE = "sbi_jeffreys:NPE_Jeffreys"
# The last one defines the class; the others import it, each under one name or two.
PATCHED_MODULES = (
    "sbi.inference",
    "sbi.inference.trainers.npe",
    "sbi.inference.trainers.npe.npe_c",
)
OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")


# ------------------------------------------------------------------------------------------------
# FILL IN: the budget under which sbi's tests train the substitute.


def test_sized_options() -> Any:
    """Return the `options` for substitutes that accept this keyword, or None for its default.

    sbi's tests assert the interface, and accuracy only loosely: a small proxy and few samples from
    the main estimator are enough, and keep the run within the time of CI.
    """
    # Here, not at the top: another class can be tested where this package is not installed.
    from sbi_jeffreys import EnergyConfig, FlowExpert, JeffreysOptions
    from sbi_jeffreys.networks.fitting import FitConfig

    fit = FitConfig(max_epochs=3)
    return JeffreysOptions(
        experts=(FlowExpert("maf", num_transforms=2),),
        proxy_fit=fit,
        proxy_folds=1,
        energy=EnergyConfig(hidden_features=10, num_contrasts=4, fit=fit),
        num_steps=4,
        steps_per_epoch=2,
        proxy_draws=60,
        proxy_batch_size=20,
        reverse_batch_size=5,
        min_trust=0.0,  # so small a proxy is not to be trusted; the stage is to run all the same
    )


test_sized_options.__test__ = False  # type: ignore[attr-defined]  # the name looks like a test


def shorten_reading() -> None:
    """Read the held-out value of the proxy with fewer draws, or this takes two thirds of the time.

    What training decides rests on this number, so that it is no option.
    """
    from sbi_jeffreys.training import held_out

    held_out._EVALUATIONS = 1_000


# ------------------------------------------------------------------------------------------------


@dataclass
class Notes:
    """What one process noted, to be summed over processes.

    Attributes:
        trainings: for each test, how often it trained the substitute, and for how many seconds.
        stale: exceptions that match no collected test.
        collected: whether this process got as far as collecting tests.
    """

    trainings: dict[str, tuple[int, float]] = field(default_factory=dict)
    stale: set[str] = field(default_factory=set)
    collected: bool = False

    def add_training(self, test: str, count: int, seconds: float) -> None:
        """Add `count` trainings of together `seconds` to what `test` has."""
        had_count, had_seconds = self.trainings.get(test, (0, 0.0))
        self.trainings[test] = (had_count + count, had_seconds + seconds)

    def to_worker_output(self) -> dict[str, Any]:
        """Return the notes as the plain types that xdist can send."""
        trainings = [[test, *numbers] for test, numbers in self.trainings.items()]
        return {"trainings": trainings, "stale": sorted(self.stale), "collected": self.collected}

    def absorb(self, sent: dict[str, Any]) -> None:
        """Add the notes of a worker, as `to_worker_output` gave them."""
        for test, count, seconds in sent["trainings"]:
            self.add_training(test, count, seconds)
        self.stale |= set(sent["stale"])
        self.collected |= sent["collected"]


notes = Notes()


def load_class(path: str) -> type:
    """Return the class that `path`, written `module:name`, stands for."""
    module_name, colon, name = path.partition(":")
    if not colon:
        raise pytest.UsageError(
            f"{SUBSTITUTE_VARIABLE}={path!r} names no class: write it as 'module:Class', "
            f"for example {DEFAULT_SUBSTITUTE!r}."
        )
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise pytest.UsageError(
            f"cannot load the substitute {path!r} ({error}): install the package that has it "
            f"(`pip install -e .` in its checkout), or name another class in {SUBSTITUTE_VARIABLE}."
        ) from error


def test_sized(substitute: type, original: type, options: Any) -> type:
    """Return a subclass of `substitute` that passes for `original`.

    Args:
        substitute: the class to test.
        original: the class of sbi whose name the subclass takes. Log messages and pickles carry
            the name, and a pickle finds the subclass under it, because it is put there.
        options: the `options` for the constructor where the caller gives none; None, or a
            constructor without this keyword, leaves every argument as it was.

    Returns:
        The subclass. It notes each training, and changes nothing else.
    """
    budget: dict[str, Any] = {}
    if options is not None and "options" in inspect.signature(substitute).parameters:
        budget["options"] = options

    @functools.wraps(substitute.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        substitute.__init__(self, *args, **{**budget, **kwargs})

    @functools.wraps(substitute.train)  # type: ignore[attr-defined]
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return substitute.train(self, *args, **kwargs)  # type: ignore[attr-defined]
        finally:
            # Pytest keeps this variable as "<node id> (<setup, call or teardown>)".
            test = os.environ.get("PYTEST_CURRENT_TEST", "?").rpartition(" ")[0]
            notes.add_training(test, 1, time.perf_counter() - start)

    body = {
        "__init__": __init__,
        "train": train,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": substitute.__doc__,
    }
    return type(original.__name__, (substitute,), body)


test_sized.__test__ = False  # type: ignore[attr-defined]


def substitute_in_sbi(make: Callable[[type], type]) -> None:
    """Replace sbi's `NPE_C`, under all its names in `PATCHED_MODULES`, by `make(NPE_C)`."""
    modules = [importlib.import_module(name) for name in PATCHED_MODULES]
    original = modules[-1].NPE_C
    replacement = make(original)
    for module in modules:
        names = [name for name, value in vars(module).items() if value is original]
        if not names:
            raise pytest.UsageError(
                f"{module.__name__} has no NPE_C any more, so nothing was substituted: "
                "bring PATCHED_MODULES in tests/host/sbi_substitute.py up to date."
            )
        for name in names:
            setattr(module, name, replacement)


def read_exceptions(path: Path) -> dict[str, str]:
    """Return the listed exceptions, node id to reason, from lines `node id = reason`."""
    exceptions: dict[str, str] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        # The last ' = ', because an id may have one among its parameters; a reason may not.
        node_id, _, reason = (part.strip() for part in line.rpartition(" = "))
        if not node_id or not reason:
            raise pytest.UsageError(
                f"{path}:{number}: expected 'node id = reason', got {line!r}: an exception "
                "without a reason is not accepted."
            )
        exceptions[node_id] = reason
    return exceptions


def mark_exceptions(items: Iterable[pytest.Item], exceptions: dict[str, str]) -> set[str]:
    """Mark the listed tests as expected to fail; return the entries that match no test.

    The mark is strict: an exception that is no longer needed fails, and is to be struck out.
    """
    unmatched = set(exceptions)
    for item in items:
        if item.nodeid in exceptions:
            unmatched.discard(item.nodeid)
            mark = pytest.mark.xfail(reason=exceptions[item.nodeid], strict=True)
            item.add_marker(mark, append=False)
    return unmatched


def complaints(summed: Notes) -> list[str]:
    """Return what is wrong with the run as a whole, each with its remedy."""
    found = [
        f"the exception for {node_id} matches no test: correct or strike out its line"
        for node_id in sorted(summed.stale)
    ]
    if summed.collected and not summed.trainings:
        found.append("no test trained the substitute: select tests that train NPE (files.txt)")
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that `run.py` sets."""
    group = parser.getgroup("sbi_substitute")
    group.addoption("--host-exceptions", type=Path, help="file with lines 'node id = reason'")
    group.addoption(
        "--host-partial",
        action="store_true",
        help="only some of the files run: do not look for stale exceptions",
    )
    group.addoption(
        "--host-costs", type=int, default=0, help="list this many of the most expensive trainings"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Substitute, before any test module imports a name."""
    path = os.environ.get(SUBSTITUTE_VARIABLE, DEFAULT_SUBSTITUTE)
    substitute = load_class(path)
    shorten_reading()
    substitute_in_sbi(lambda original: test_sized(substitute, original, test_sized_options()))


@pytest.hookimpl(tryfirst=True)  # before `-m` deselects: an exception may be for a slow test
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the exceptions."""
    path = config.getoption("--host-exceptions")
    unmatched = mark_exceptions(items, read_exceptions(path)) if path else set()
    if not config.getoption("--host-partial"):
        notes.stale |= unmatched


def pytest_collection_finish(session: pytest.Session) -> None:
    """Note that there are tests to run."""
    notes.collected = bool(session.items)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add the notes of an xdist worker that ended."""
    sent = getattr(node, "workeroutput", {}).get("sbi_substitute")
    if sent is not None:  # None from a worker that crashed, which fails the run by itself
        notes.absorb(sent)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send the notes to the controller, or judge the run."""
    workeroutput = getattr(session.config, "workeroutput", None)
    if workeroutput is not None:
        workeroutput["sbi_substitute"] = notes.to_worker_output()
    elif session.exitstatus == pytest.ExitCode.OK and complaints(notes):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the costs, where asked for, and the complaints."""
    write = terminalreporter.write_line
    by_cost = sorted(notes.trainings.items(), key=lambda entry: -entry[1][1])
    for test, (count, seconds) in by_cost[: config.getoption("--host-costs")]:
        write(f"{seconds:8.1f} s in {count:3d} trainings: {test}")
    for complaint in complaints(notes):
        write(f"ERROR: {complaint}", red=True)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Print one line that sums up, as the very last."""
    terminalreporter = config.pluginmanager.get_plugin("terminalreporter")
    if terminalreporter is None or hasattr(config, "workeroutput"):
        return
    counts = {key: len(terminalreporter.stats.get(key, ())) for key in OUTCOMES}
    trainings = sum(count for count, _ in notes.trainings.values())
    seconds = sum(seconds for _, seconds in notes.trainings.values())
    terminalreporter.write_line(
        f"{os.environ.get(SUBSTITUTE_VARIABLE, DEFAULT_SUBSTITUTE)} "
        f"against sbi {sbi.__version__} in {Path(sbi.__file__).parent}: "
        + ", ".join(f"{count} {key}" for key, count in counts.items())
        + f"; trained {trainings} times in {seconds:.0f} s"
    )

"""Shared fixtures: tests are seeded, write no logs to the checkout, and read the proxy quickly."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sbi_jeffreys.training import held_out, tempering

_SHORT = (
    (held_out, "_EVALUATIONS", 1_000),
    (tempering, "_PAIRS", 40),
    (tempering, "_OF_PRIOR", 200),
)


def pytest_configure(config: pytest.Config) -> None:
    """One thread for each process of `-n 2`: more would only get in each other's way."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give whole files to the processes of `-n 2`: what a file's tests share is made once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(autouse=True)
def _seeded(tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True, scope="session")
def _short_reading() -> Iterator[list]:
    """Fewer draws to judge the proxy by: all of them take half of a small training.

    A test to which their number matters is marked `full_reading`.
    """
    with pytest.MonkeyPatch.context() as patch:
        full = [(part, name, getattr(part, name)) for part, name, _ in _SHORT]
        for part, name, short in _SHORT:
            patch.setattr(part, name, short)
        yield full


@pytest.fixture(autouse=True)
def _full_reading(request: pytest.FixtureRequest, monkeypatch, _short_reading: list) -> None:
    if request.node.get_closest_marker("full_reading") is not None:
        for part, name, value in _short_reading:
            monkeypatch.setattr(part, name, value)

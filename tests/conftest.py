"""Shared fixtures: tests are seeded, write no logs to the checkout, and read the proxy quickly."""

from collections.abc import Iterator

import pytest
import torch

from sbi_jeffreys.training import held_out


@pytest.fixture(autouse=True)
def _seeded(tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True, scope="session")
def _short_reading() -> Iterator[int]:
    """Fewer draws for the held-out value of the proxy: all of them take half of a small training.

    A test to which their number matters is marked `full_reading`.
    """
    with pytest.MonkeyPatch.context() as patch:
        full = held_out._EVALUATIONS
        patch.setattr(held_out, "_EVALUATIONS", 1_000)
        yield full


@pytest.fixture(autouse=True)
def _full_reading(request: pytest.FixtureRequest, monkeypatch, _short_reading: int) -> None:
    if request.node.get_closest_marker("full_reading") is not None:
        monkeypatch.setattr(held_out, "_EVALUATIONS", _short_reading)

"""Shared fixtures: every test seeded, and no TensorBoard folders in the working tree."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded(tmp_path, monkeypatch) -> Iterator[None]:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    yield

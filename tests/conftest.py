"""Shared fixtures: every test seeded, and no TensorBoard folders in the working tree."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded(tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)

"""Result files of the scripts beside this one: a line of JSON for each cell; runs resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def finished(out: Path) -> set[tuple]:
    """The cells that are in the file."""
    return {tuple(row["cell"]) for row in rows(out)} if out.exists() else set()


def rows(out: Path) -> list[dict[str, Any]]:
    """The lines of the file."""
    return [json.loads(line) for line in out.read_text().splitlines()]


def append(out: Path, cell: tuple, result: dict[str, Any]) -> None:
    """Add a cell's line to the file."""
    with out.open("a") as file:
        file.write(json.dumps({"cell": cell, **result}) + "\n")


def simulations(simulator: Any, num: int, seed: int) -> tuple[Tensor, Tensor]:
    """θ and x of a simulator or task with `prior` and `simulate`; seeds the training after them."""
    torch.manual_seed(seed)
    theta = simulator.prior.sample((num,))
    x = simulator.simulate(theta)
    torch.manual_seed(seed + 1)
    return theta, x

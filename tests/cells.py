"""What the measuring scripts share: a command line, and result files that runs resume."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
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


def grouped(found: list[dict[str, Any]], part: int = 0) -> dict[Any, list[dict[str, Any]]]:
    """Rows by one part of their cells, the task if it is the first, in the order of the file."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault(row["cell"][part], []).append(row)
    return groups


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


def command_line(
    doc: str, *commands: Callable[[argparse.Namespace], None], **options: dict[str, Any]
) -> None:
    """Run the command that a script was called with, on one thread and without warnings.

    Args:
        doc: The script's docstring, whose first line describes it.
        commands: Functions, called by their names with all arguments, `out` among them.
        options: Settings of each option's `add_argument`.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    by_name = {command.__name__: command for command in commands}
    parser.add_argument("command", choices=by_name)
    parser.add_argument("out")
    for name, settings in options.items():
        parser.add_argument(f"--{name}", **settings)
    chosen = parser.parse_args()
    by_name[chosen.command](chosen)

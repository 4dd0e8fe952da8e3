"""Argument types of the command line: bad values end in a message and exit code 2."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection
from contextlib import suppress

from sbi_jeffreys.benchmark.methods import METHODS
from sbi_jeffreys.benchmark.tasks import known_tasks

__all__ = ["add_common", "int_list", "items", "known_items", "method_list", "positive_int"]


def task_name(text: str) -> str:
    """The name of a known task."""
    return _known(text, sorted(known_tasks()))


def task_list(text: str) -> list[str]:
    """Known tasks, comma-separated."""
    return known_items(text, sorted(known_tasks()))


def method_list(text: str) -> list[str]:
    """Known methods, comma-separated."""
    return known_items(text, METHODS)


def positive_int(minimum: int = 1) -> Callable[[str], int]:
    """A whole number of at least `minimum`; 1e3 is one."""

    def parse(text: str) -> int:
        value = math.nan
        with suppress(ValueError):
            value = float(text)
        if not (value >= minimum and value.is_integer()):
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {minimum}, got {text!r}"
            )
        return int(value)

    return parse


def int_list(minimum: int = 1) -> Callable[[str], list[int]]:
    """Whole numbers of at least `minimum`, comma-separated."""
    parse = positive_int(minimum)
    return lambda text: [parse(item) for item in items(text)]


def items(text: str) -> list[str]:
    """The different entries of a comma-separated list, which must have one."""
    found = [item.strip() for item in text.split(",") if item.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"expected a comma-separated list, got {text!r}")
    return list(dict.fromkeys(found))


def known_items(text: str, names: Collection[str]) -> list[str]:
    """The entries of a comma-separated list, each of which is one of the names."""
    return [_known(item, names) for item in items(text)]


def _known(text: str, names: Collection[str]) -> str:
    if text not in names:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(names)}, got {text!r}")
    return text


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options that every training command has."""
    parser.add_argument("--quiet", action="store_true", help="no progress, only results")
    parser.add_argument(
        "--fast", action="store_true", help="a few steps only: a smoke run, no measurement"
    )

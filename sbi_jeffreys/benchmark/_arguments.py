"""Argument types of the command line: bad values end in a message and exit code 2."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from sbi_jeffreys.benchmark.methods import get_method
from sbi_jeffreys.benchmark.tasks import get_task

__all__ = [
    "add_common",
    "int_list",
    "items",
    "method_list",
    "positive_int",
    "task_list",
    "task_name",
]


def task_name(text: str) -> str:
    """The name of a known task."""
    try:
        get_task(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def method_name(text: str) -> str:
    """The name of a known method."""
    try:
        get_method(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def positive_int(minimum: int = 1) -> Callable[[str], int]:
    """A whole number of at least `minimum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {minimum}, got {text!r}"
            )
        return value

    return parse


def items(text: str) -> list[str]:
    """The different entries of a comma-separated list, which must have one."""
    found = [item.strip() for item in text.split(",") if item.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"expected a comma-separated list, got {text!r}")
    return list(dict.fromkeys(found))


def task_list(text: str) -> list[str]:
    """Known tasks, comma-separated."""
    return [task_name(item) for item in items(text)]


def method_list(text: str) -> list[str]:
    """Known methods, comma-separated."""
    return [method_name(item) for item in items(text)]


def int_list(minimum: int = 1) -> Callable[[str], list[int]]:
    """Whole numbers of at least `minimum`, comma-separated."""
    parse = positive_int(minimum)
    return lambda text: [parse(item) for item in items(text)]


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options that every training command has."""
    parser.add_argument("--quiet", action="store_true", help="no progress, only results")
    parser.add_argument(
        "--fast", action="store_true", help="a few steps only: a smoke run, no measurement"
    )

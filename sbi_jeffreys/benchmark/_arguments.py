"""Argument types of the command line: bad values end in a message and exit code 2."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from sbi_jeffreys.benchmark.methods import METHODS
from sbi_jeffreys.benchmark.tasks import known_tasks

DEFAULT = "(default: %(default)s)"
_MOST = 10_000_000  # simulations, samples and the like: a slip above it would fill the memory


def task_name(text: str) -> str:
    """The name of a known task."""
    return _known(text, sorted(known_tasks()))


def task_list(text: str) -> list[str]:
    """Known tasks, comma-separated."""
    return known_items(text, sorted(known_tasks()))


def method_list(text: str) -> list[str]:
    """Known methods, comma-separated."""
    return known_items(text, METHODS)


def positive_int(minimum: int = 1, maximum: int = _MOST) -> Callable[[str], int]:
    """A whole number from `minimum` to `maximum`, which may be written as 1e3."""

    def parse(text: str) -> int:
        value = math.nan
        with suppress(ValueError):
            value = float(text)
        bound = f"at most {maximum:,}" if value > maximum else f"at least {minimum}"
        if not (minimum <= value <= maximum and value.is_integer()):
            raise argparse.ArgumentTypeError(f"expected a whole number of {bound}, got {text!r}")
        return int(value)

    return parse


#: Parses a seed.
seed_number = positive_int(0, 2**31 - 1)


def int_list(minimum: int = 1) -> Callable[[str], list[int]]:
    """Whole numbers of at least `minimum`, comma-separated."""
    parse = positive_int(minimum)
    return lambda text: [parse(item) for item in items(text)]


def items(text: str) -> list[str]:
    """The distinct entries of a comma-separated list, which must have at least one."""
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


def seed_range(args: argparse.Namespace) -> range:
    """The seeds that `add_run_arguments` asks for."""
    return range(args.first_seed, args.first_seed + args.seeds)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options that every training command has."""
    parser.add_argument("--quiet", action="store_true", help="no progress, only results")
    parser.add_argument(
        "--fast", action="store_true", help="a few steps only: a smoke run, no measurement"
    )


def add_run_arguments(parser: argparse.ArgumentParser, out: str, seeds: int) -> None:
    """Add the options of every command that fills a results folder."""
    parser.add_argument("--seeds", type=positive_int(), default=seeds, help=f"how many {DEFAULT}")
    text = f"the lowest one {DEFAULT}"
    parser.add_argument("--first-seed", type=seed_number, default=0, help=text)
    parser.add_argument("--jobs", type=positive_int(), default=1, help=f"processes {DEFAULT}")
    parser.add_argument("--out", type=Path, default=Path(out), help=f"folder {DEFAULT}")
    add_common(parser)

"""Command line: `python -m sbi_jeffreys [COMMAND] [options]`.

Without a command, the main job: NPE against NPE_Jeffreys on one task, a table and two figures.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

import matplotlib

try:
    from sbi_jeffreys.benchmark import (
        ablation,
        compare,
        main_job,
        report,
        rounds,
        runner,
        tables,
    )
    from sbi_jeffreys.benchmark._running import CommandError
    from sbi_jeffreys.benchmark.tasks import get_task, known_tasks
except ModuleNotFoundError as error:
    if error.name not in ("joblib", "scipy", "tabulate"):
        raise
    print(
        f"error: the command line needs {error.name}, which is not installed; install what the "
        "package's extra `benchmark` has: pip install joblib scipy tabulate",
        file=sys.stderr,
    )
    sys.exit(2)

_COMMANDS = {
    "compare": compare,
    "benchmark": runner,
    "report": report,
    "ablation": ablation,
    "rounds": rounds,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = argparse.ArgumentParser(prog="python -m sbi_jeffreys", description=main_job.__doc__)
    main_job.add_arguments(parser)
    parser.set_defaults(run=main_job.run)
    commands = parser.add_subparsers(
        title="commands",
        dest="command",
        metavar="{compare,benchmark,report,ablation,rounds,tasks}",
    )
    for name, module in _COMMANDS.items():
        text = module.__doc__ or ""
        command = commands.add_parser(name, help=text.splitlines()[0], description=text)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    tasks = commands.add_parser("tasks", help="list the tasks")
    tasks.set_defaults(run=list_tasks)
    return parser


def list_tasks(args: argparse.Namespace) -> int:
    """Print the tasks and their sizes."""
    rows = [["task", "parameters", "outputs", "reference posterior"]]
    for name in sorted(known_tasks()):
        task = get_task(name)
        kind = "exact" if task.exact_reference else "by importance sampling"
        rows.append([name, str(task.dim_theta), str(task.dim_x), kind])
    print(tables.plain(rows))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; the exit code: 1 if measurements failed, 2 if a command cannot run."""
    parser, words = build_parser(), list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    if args.command not in (None, *words[:1]):  # the command's defaults have replaced these options
        parser.error(
            f"expected the command {args.command} before its options, got {words[0]} before it; "
            f"write options after the command: {parser.prog} {args.command} …"
        )
    matplotlib.use("Agg")  # figures are written to files, also where there is no display
    formatwarning = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        remedy = "pass another path, or change its permissions"
        print(f"error: {named}{error.strerror or error}; {remedy}.", file=sys.stderr)
        return 2
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        warnings.formatwarning = formatwarning


if __name__ == "__main__":
    sys.exit(main())

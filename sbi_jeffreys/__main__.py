"""Command line: `python -m sbi_jeffreys [COMMAND] [options]`.

Without a command, the main job: NPE against NPE_Jeffreys on one task, a table and two figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from sbi_jeffreys.benchmark import ablation, main_job, report, rounds, runner
from sbi_jeffreys.benchmark.tasks import TASKS, get_task
from sbi_jeffreys.benchmark.tasks.structured import STRUCTURED_TASKS


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = argparse.ArgumentParser(prog="python -m sbi_jeffreys", description=main_job.__doc__)
    main_job.add_arguments(parser)
    parser.set_defaults(run=main_job.run)
    commands = parser.add_subparsers(
        title="commands", metavar="{benchmark,report,ablation,rounds,tasks}"
    )
    for name, module in (
        ("benchmark", runner),
        ("report", report),
        ("ablation", ablation),
        ("rounds", rounds),
    ):
        command = commands.add_parser(name, help=_first_line(module), description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    tasks = commands.add_parser("tasks", help="list the tasks")
    tasks.set_defaults(run=list_tasks)
    return parser


def _first_line(module: ModuleType) -> str:
    return (module.__doc__ or "").splitlines()[0]


def list_tasks(args: argparse.Namespace) -> int:
    """Print the tasks and their sizes."""
    rows = [("task", "θ", "x", "reference")]
    for name in (*sorted(TASKS), *sorted(STRUCTURED_TASKS)):
        task = get_task(name)
        kind = "exact" if task.exact_reference else "sampled"
        rows.append((name, str(task.dim_theta), str(task.dim_x), kind))
    print(main_job.format_table(rows))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; the exit code."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

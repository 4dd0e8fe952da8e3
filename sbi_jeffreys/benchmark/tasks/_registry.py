"""The table of tasks by name, and how a user adds another."""

from __future__ import annotations

from typing import TypeVar

from .base import Task
from .curves import CURVE_TASKS
from .structured import STRUCTURED_TASKS

TASKS: dict[str, type[Task]] = {}

TaskType = TypeVar("TaskType", bound=type[Task])


def register_task(cls: TaskType) -> TaskType:
    """Make a task known by its `name`; use it as a class decorator.

    Raises:
        ValueError: If the class has no name, or another class already has it.
    """
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"cls: expected a Task subclass with a non-empty `name`, got {cls.__name__} with "
            f'name {name!r}; add e.g. `name = "my_task"` to the class body.'
        )
    known = TASKS.get(name, cls)
    # The same class defined again (a notebook cell run twice, a module reloaded) replaces itself.
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"cls: expected a new task name, got {name!r}, which {known.__qualname__} already "
            "has; choose another `name`."
        )
    TASKS[name] = cls
    return cls


def known_tasks() -> dict[str, type[Task]]:
    """All tasks by name, of vector-valued x and structured."""
    return {**CURVE_TASKS, **STRUCTURED_TASKS, **TASKS}


def get_task(name: str) -> Task:
    """A fresh instance of the task of that name, of vector-valued x or structured.

    Raises:
        ValueError: If no task of that name is registered; the message lists the known ones.
    """
    known = known_tasks()
    if name not in known:
        raise ValueError(
            f"name: expected one of {', '.join(sorted(known))}, got {name!r}; "
            "add your own task with `register_task`."
        )
    return known[name]()

"""The benchmark's tasks, by name.

The ten of sbibm (Lueckmann et al. 2021, "Benchmarking simulation-based inference", PMLR 130),
each with a likelihood and a reference posterior for any x. Add your own:

    @register_task
    class MyTask(Task):
        name = "my_task"
        ...
"""

from . import bernoulli_glm as bernoulli_glm
from . import gaussian_linear as gaussian_linear
from . import gaussian_mixture as gaussian_mixture
from . import lotka_volterra as lotka_volterra
from . import sir as sir
from . import slcp as slcp
from . import two_moons as two_moons
from ._reference import ReferenceConvergenceError
from ._registry import TASKS, get_task, known_tasks, register_task
from .base import Task

__all__ = [
    "TASKS",
    "ReferenceConvergenceError",
    "Task",
    "get_task",
    "known_tasks",
    "register_task",
]

"""Workers: this process, joblib's processes, or a Dask cluster, behind one `map`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any

__all__ = ["Workers", "warm_up"]

_warm = False


class Workers:
    """A context with a `map` that yields results as they come.

    Args:
        jobs: Number of processes; with one, everything runs in this process.
        backend: "loky" or "dask".

    Raises:
        ImportError: If Dask is asked for and not installed.
    """

    def __init__(self, jobs: int, backend: str = "loky") -> None:
        self.jobs, self.backend = jobs, backend
        self._stack = ExitStack()

    def __enter__(self) -> Workers:
        if self.backend == "dask":
            client = self._stack.enter_context(_dask_client(self.jobs))
            self._stack.callback(client.close)
        return self

    def __exit__(self, *details: Any) -> None:
        self._stack.close()

    def map(self, function: Callable[..., Any], arguments: Sequence[tuple]) -> Iterator[Any]:
        """Results of `function(*arguments[k])` in the order in which they are ready."""
        if not arguments:
            return
        if self.jobs == 1 and self.backend == "loky":
            for entry in arguments:
                yield function(*entry)
            return
        from joblib import Parallel, delayed, parallel_config

        # Threads per worker are one, whatever the number of cores: timings stay comparable.
        threads = {"inner_max_num_threads": 1} if self.backend == "loky" else {}
        kind = "generator_unordered" if self.backend == "loky" else "list"
        with parallel_config(backend=self.backend, **threads):
            parallel = Parallel(n_jobs=self.jobs, return_as=kind)
            yield from parallel(delayed(function)(*entry) for entry in arguments)


def _dask_client(jobs: int) -> Any:
    """A Dask client: of the scheduler in DASK_SCHEDULER_ADDRESS, else of local processes."""
    try:
        import dask.config  # pyright: ignore[reportMissingImports]
        from dask.distributed import Client  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "backend 'dask' needs Dask, which is not installed: pip install 'sbi_jeffreys[dask]', "
            "or use --backend loky."
        ) from error
    address = dask.config.get("scheduler-address", None)
    return Client(address) if address else Client(n_workers=jobs, threads_per_worker=1)


def warm_up() -> None:
    """Train once on nothing, so that imports and first-call set-up are charged to no method."""
    global _warm
    if _warm:
        return
    from sbi_jeffreys.benchmark._running import seeded
    from sbi_jeffreys.benchmark.methods import FitContext, get_method
    from sbi_jeffreys.benchmark.tasks import get_task

    task = get_task("gaussian_linear")
    with seeded(0):
        theta, x = task.simulate_joint(50)
        for name in ("npe_nsf", "npe_jeffreys", "nle_mcmc"):
            # A method that does not even run here fails again in its cells, and is recorded there.
            with suppress(Exception):
                get_method(name).fit(task, theta, x, 0, FitContext(fast=True))
    _warm = True

"""Workers: this process, joblib's processes, or a Dask cluster, behind one `map`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from sbi_jeffreys.benchmark._running import CommandError

#: `map(function, arguments)` yields the results of `function(*arguments[k])` as they are ready.
Map = Callable[[Callable[..., Any], Sequence[tuple]], Iterator[Any]]


@contextmanager
def workers(jobs: int, backend: str = "loky") -> Iterator[Map]:
    """Processes that work until the block ends; with one job of "loky", this process alone.

    Args:
        jobs: Number of processes.
        backend: "loky" (this machine) or "dask" (a cluster).

    Raises:
        CommandError: If Dask is asked for, and is not installed or does not work.
    """

    def work(function: Callable[..., Any], arguments: Sequence[tuple]) -> Iterator[Any]:
        if jobs == 1 and backend == "loky":
            yield from (function(*entry) for entry in arguments)
        elif arguments:
            from joblib import Parallel, delayed, parallel_config

            # One thread per worker, whatever the number of cores: timings stay comparable.
            threads = {"inner_max_num_threads": 1} if backend == "loky" else {}
            kind = "generator_unordered" if backend == "loky" else "list"
            with parallel_config(backend=backend, **threads):
                parallel = Parallel(n_jobs=jobs, return_as=kind)
                yield from parallel(delayed(function)(*entry) for entry in arguments)

    with _dask_client(jobs) if backend == "dask" else nullcontext():
        yield work


def _dask_client(jobs: int) -> Any:
    """A Dask client: of the scheduler in DASK_SCHEDULER_ADDRESS, else of local processes."""
    try:
        import dask.config  # pyright: ignore[reportMissingImports]
        from dask.distributed import Client  # pyright: ignore[reportMissingImports]
    except Exception as error:
        missing = (isinstance(error, ModuleNotFoundError) and error.name) or ""
        if missing.partition(".")[0] in ("dask", "distributed"):
            raise CommandError(
                "backend 'dask' needs Dask, which is not installed: pip install "
                "'dask[distributed]', or use --backend loky."
            ) from error
        raise CommandError(
            f"backend 'dask': Dask is installed, but importing it fails with "
            f"{type(error).__name__}: {error}. Repair the installation, or use --backend loky."
        ) from error
    address = dask.config.get("scheduler-address", None)
    return Client(address) if address else Client(n_workers=jobs, threads_per_worker=1)

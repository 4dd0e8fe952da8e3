"""Workers: this process, joblib's processes, or a Dask cluster, behind one `map`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from sbi_jeffreys.benchmark._running import CommandError

__all__ = ["Workers"]


class Workers:
    """A context with a `map` that yields results as they come.

    Args:
        jobs: Number of processes; with one, everything runs in this process.
        backend: "loky" or "dask".

    Raises:
        CommandError: If Dask is asked for, and is not installed or does not work.
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
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("dask", "distributed"):
            raise _broken_dask(error) from error
        raise CommandError(
            "backend 'dask' needs Dask, which is not installed: pip install 'sbi_jeffreys[dask]', "
            "or use --backend loky."
        ) from error
    except Exception as error:
        raise _broken_dask(error) from error
    address = dask.config.get("scheduler-address", None)
    return Client(address) if address else Client(n_workers=jobs, threads_per_worker=1)


def _broken_dask(error: Exception) -> CommandError:
    return CommandError(
        f"backend 'dask': Dask is installed, but importing it fails with {type(error).__name__}: "
        f"{error}. Repair the installation, or use --backend loky."
    )

"""Where the work of a build is done: in processes of this machine, as tasks of a Ray cluster, or as a SLURM job array.

All call the same functions, which write the same bytes. A function is told all it needs by its task; what it leaves
behind are files, so that what is done survives the death of any process.
"""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from crossguard.configs.errors import JobError, UserError
from crossguard.configs.parent_death import die_with_parent
from crossguard.configs.schema.build import BuildConfig

Task = TypeVar("Task")
Result = TypeVar("Result")

DIED = "a worker process was killed (out of memory?); start again, a build goes on"


class Executor(Protocol):
    """Calls a function for each task; the first error ends all."""

    def run(
        self, function: Callable[[Task], Result], tasks: Sequence[Task], needed: Sequence[Path] = ()
    ) -> Iterator[tuple[Task, Result]]:
        """Each task with its result, as they are done.

        Args:
            function: of a module, so that another process finds it.
            tasks: what it is called with.
            needed: files and folders that each machine must see.

        Raises:
            JobError: a process died, or a machine does not see what it needs.
            Exception: what the function raises.
        """
        ...


def open_executor(config: BuildConfig) -> Executor:
    """The executor that `build.executor` names.

    Raises:
        UserError: it is not installed.
    """
    if config.executor == "processes":
        return Processes(config.num_workers)
    if config.executor == "slurm":
        from crossguard.data.shards.slurm_array import SlurmArray

        if shutil.which("sbatch") is None:
            raise UserError("build.executor=slurm: sbatch: not found; build on a machine of the cluster")
        return SlurmArray(config.num_workers, config.slurm_options)
    if importlib.util.find_spec("ray") is None:
        raise UserError("build.executor=ray: Ray is not installed; pip install 'crossguard[ray]'")
    return RayTasks(config.num_workers, config.ray_address)


class Processes:
    """Processes of this machine; a single one is this process itself."""

    def __init__(self, num_workers: int):
        self.num_workers = num_workers

    def run(
        self, function: Callable[[Task], Result], tasks: Sequence[Task], needed: Sequence[Path] = ()
    ) -> Iterator[tuple[Task, Result]]:
        """See `Executor`; `needed` is there, since this machine has made it."""
        num_workers = min(self.num_workers, len(tasks))
        if num_workers <= 1:
            yield from ((task, function(task)) for task in tasks)
            return
        # Spawned, not forked: this process may hold threads, and a forked one would inherit their locks.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(os.getpid(),)) as pool:
            futures = {pool.submit(function, task): task for task in tasks}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BrokenProcessPool:
                raise JobError(DIED) from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which lets running tasks finish
    die_with_parent()
    if os.getppid() != parent:  # it ended before this process could ask to be told
        os._exit(1)


class RayTasks:
    """At most `num_workers` tasks at a time on a Ray cluster, whose machines share a file system."""

    def __init__(self, num_workers: int, address: str | None):
        self.num_workers = num_workers
        self.address = address

    def run(
        self, function: Callable[[Task], Result], tasks: Sequence[Task], needed: Sequence[Path] = ()
    ) -> Iterator[tuple[Task, Result]]:
        """See `Executor`."""
        if not tasks:
            return
        paths = [str(path.absolute()) for path in needed]
        with self._cluster() as ray:
            # No retries: what killed one process (memory, above all) would kill the next.
            remote = ray.remote(num_cpus=1, max_retries=0)(call_where_seen)
            waiting = iter(tasks)
            running: dict[Any, Task] = {}
            try:
                while True:
                    for task in islice(waiting, self.num_workers - len(running)):
                        running[remote.remote(function, task, paths)] = task
                    if not running:
                        return
                    for reference in ray.wait(list(running))[0]:
                        yield running.pop(reference), ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, ray.exceptions.RayError):
                    what = str(error.cause).partition("\n")[0]
                    raise JobError(f"build: a node cannot run it ({what}); install the same crossguard there") from None
                raise error.cause from None
            except ray.exceptions.RayError as error:
                raise JobError(f"{DIED} ({type(error).__name__})") from None

    @contextmanager
    def _cluster(self) -> Iterator[Any]:
        """Join the cluster at the address, else the one that this machine belongs to, else start one here for a while.

        Raises:
            UserError: nothing answers at the address.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anyone unasked
        import ray

        if ray.is_initialized():  # by the program that called the build
            yield ray
            return
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            ray.init(address=self.address or "auto", **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            if self.address:
                message = str(error).strip().partition("\n")[0]
                raise UserError(f"build.ray_address={self.address}: cannot be joined ({message})") from None
            ray.init(address="local", num_cpus=self.num_workers, include_dashboard=False, **quiet)
        try:
            yield ray
        finally:
            ray.shutdown()


def call_where_seen(function: Callable[[Any], Any], task: Any, needed: list[str]) -> Any:
    """Call `function` on a machine of the cluster; a medium that it does not see would look like a missing one."""
    for path in needed:
        if not os.path.exists(path):
            raise JobError(
                f"build: node {socket.gethostname()} does not see {path}; shards and media must lie in folders that "
                "all nodes share under the same path"
            )
    return function(task)

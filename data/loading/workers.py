"""Processes that read and decode: they are handed tasks in order and hand back results in the same order.

They are plain processes rather than those of torch's DataLoader, so that they need no torch: it would be most of their
memory and of the time they take to start.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import select
import signal
import threading
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import cycle
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any, Protocol

from crossguard.configs.errors import JobError
from crossguard.configs.preemption import SIGNALS
from crossguard.data.loading.transport import Places

# How long a worker may outlive a trainer that was killed.
SECONDS_BETWEEN_LOOKS = 1.0
# Tasks of a worker at a time. What it answers must fit into a pipe's buffer: while the trainer waits to hand over more
# tasks, nobody reads the answers.
MOST_AHEAD = 64
# Of malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
# The most that glibc accepts for the latter.
KEPT_BYTES = 32 << 20


class Work(Protocol):
    """What a worker does; picklable."""

    def __getitem__(self, task: Any) -> Any:
        """The result of a task; called in the worker."""
        ...

    def received(self, result: Any) -> Any:
        """What is delivered of a result; called in the training process. It copies what it keeps of the result's
        arrays: their memory is written to again."""
        ...


def results(
    work: Work, tasks: Iterable[Any], num_workers: int, *, ahead: int = 2, preload: str = __name__
) -> Generator[Any, None, None]:
    """`work.received(work[task])` for each task, in order.

    The workers cannot change what is delivered: with any number of them, 0 included, the results are the same.
    Close the generator (`contextlib.closing`) to end them.

    Args:
        work: called in the workers.
        tasks: drawn in this process, a few ahead of the results.
        num_workers: processes; 0 works here.
        ahead: tasks that are prepared for each worker beforehand.
        preload: a module that the workers need, e.g. the tokenizer's; imported once for all of them.

    Raises:
        JobError: a worker has ended.
    """
    if not num_workers:
        for task in tasks:
            yield work.received(work[task])
        return
    places = Places(num_workers * ahead)
    context = _context(preload)
    workers: list[_Worker] = []
    try:
        with _signals_blocked():
            for number in range(num_workers):
                workers.append(_Worker(context, work, places, range(number * ahead, (number + 1) * ahead)))
        busy: deque[_Worker] = deque()
        for worker, task in zip(cycle(workers), tasks):
            if len(busy) < num_workers * ahead:
                worker.start(task)
                busy.append(worker)
                continue
            result = work.received(places.get(*busy.popleft().answer()))
            worker.start(task)  # Its place is free now; the worker need not wait until the result has been used.
            busy.append(worker)
            yield result
            del result  # No longer than whoever asked for it: the next one can take its memory.
        for worker in busy:
            yield work.received(places.get(*worker.answer()))
    finally:
        for worker in workers:
            worker.end()


def tasks_ahead(tasks: int, num_workers: int) -> int:
    """How many tasks each worker prepares so that all of them together are at least `tasks` ahead."""
    return min(MOST_AHEAD, max(2, math.ceil(tasks / max(1, num_workers))))


class _Worker:
    """A process, as the trainer sees it."""

    def __init__(self, context: ForkServerContext, work: Work, places: Places, own: range):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work, places, own, os.getpid()), daemon=True)
        self.process.start()
        theirs.close()

    def start(self, task: Any) -> None:
        """Hand over a task."""
        with self._alive():
            self.connection.send(task)

    def answer(self) -> tuple[int, list[int]]:
        """The place and the sizes of the next result."""
        with self._alive():
            answer = self.connection.recv()
        if isinstance(answer, Exception):
            raise answer
        place, sizes = answer
        return place, sizes

    def end(self) -> None:
        """End it at once; it keeps nothing that could be lost."""
        self.connection.close()
        self.process.kill()
        self.process.join()

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError):
            self.process.join()
            raise JobError(
                f"a process that reads posts has ended (status {self.process.exitcode}); status -9 is often too little "
                "memory: lower train.num_workers, train.micro_batch_size or evaluation.batch_size"
            ) from None


def _serve(connection: Connection, work: Work, places: Places, own: range, trainer: int) -> None:
    """A worker's life: tasks from the connection, results into its `own` places in turn."""
    threading.Thread(target=_end_with, args=(trainer,), name="trainer-watch", daemon=True).start()
    _keep_freed_memory()
    with suppress(EOFError, ConnectionError):  # The trainer has ended.
        for place in cycle(own):
            connection.send(_answer(work, places, place, connection.recv()))


def _keep_freed_memory() -> None:
    """Let glibc keep what a batch has taken for the next one: given back to the kernel, it would have to come again
    page by page, which takes as long as a third of the decoding."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)


def _answer(work: Work, places: Places, place: int, task: Any) -> tuple[int, list[int]] | Exception:
    try:
        return place, places.put(place, work[task])
    except JobError as error:
        return error
    except Exception:
        return RuntimeError(f"in a process that reads posts:\n{traceback.format_exc()}")


def _context(preload: str) -> ForkServerContext:
    """Workers are forked from a server that has imported everything and does nothing else.

    Forking the training process itself is fast, but copies locks that gloo's and CUDA's threads may hold; spawning is
    safe, but every worker imports everything anew.
    """
    context = multiprocessing.get_context("forkserver")
    modules = dict.fromkeys([__name__, "crossguard.data.loading.loader", preload])
    context.set_forkserver_preload([name for name in modules if name != "__main__"])
    return context


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """What is started inside does not see SIGINT and the signals of preemption, which a terminal or a scheduler sends
    to every process of a job: the training process decides when to stop, and needs its workers until then."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # which ignores SIGINT and SIGTERM, but unblocks them when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *SIGNALS})
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with(trainer: int) -> None:
    """End this worker when the trainer sends SIGTERM, as multiprocessing does to stop it, or is no more.

    The worker's parent is the server, which outlives the trainer as long as it has workers: neither the kernel's
    parent-death signal nor the connection, while it computes, would tell.
    """
    try:
        alive = os.pidfd_open(trainer)
        while not select.select([alive], [], [], 0)[0]:
            sent = signal.sigtimedwait({signal.SIGTERM}, SECONDS_BETWEEN_LOOKS)
            if sent is not None and sent.si_pid == trainer:
                break
    except ProcessLookupError:  # it ended before it could be watched
        pass
    os.kill(os.getpid(), signal.SIGKILL)

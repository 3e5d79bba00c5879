"""Processes that read and decode: they are handed tasks in order and hand back results in the same order."""

from __future__ import annotations

import math
import multiprocessing
import os
import select
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from crossguard.data.loading.transport import Places

# How long a worker may outlive a trainer that was killed.
SECONDS_BETWEEN_LOOKS = 1.0


class Work(Protocol):
    """What a worker does; picklable."""

    def __getitem__(self, task: Any) -> Any:
        """The result of a task."""
        ...


def results(
    work: Work, tasks: Iterable[Any], num_workers: int, *, ahead: int = 2, preload: str = __name__
) -> Generator[Any, None, None]:
    """`work[task]` for each task, in order.

    The workers cannot change what is delivered: with any number of them, 0 included, the results are the same.
    Close the generator (`contextlib.closing`) to end them: left to the collector of cycles, pipes close before the
    workers are told, and each takes seconds to end.

    Args:
        work: called in the workers.
        tasks: drawn in this process, a few ahead of the results.
        num_workers: processes; 0 works here.
        ahead: tasks that are prepared for each worker beforehand.
        preload: a module that the workers need, e.g. the tokenizer's; imported once for all of them.
    """
    # A worker is handed its next task when one of its results is taken, and a result is copied before the one after it
    # is asked for: with one place more than tasks, none is written that is still to be read.
    places = Places(num_workers * (ahead + 1)) if num_workers else None
    pinned = torch.cuda.is_available()
    loader: DataLoader[Any] = DataLoader(
        _Tasks(work, places, ahead + 1),
        batch_size=None,
        sampler=tasks,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        prefetch_factor=ahead if num_workers else None,
        multiprocessing_context=_context(preload) if num_workers else None,
        worker_init_fn=partial(_start_worker, os.getpid()),
        pin_memory=pinned and not num_workers,
        # The workers' seeds would otherwise be drawn from torch's global generator, and a resumed run, which starts
        # its workers at another step, would drop out other units than the run that was never interrupted.
        generator=torch.Generator(),
    )
    with _signals_blocked():
        delivered = iter(loader)
    for result in delivered:
        yield places.take(result, pinned) if places else result


def tasks_ahead(tasks: int, num_workers: int) -> int:
    """How many tasks each worker prepares so that all of them together are at least `tasks` ahead."""
    return max(2, math.ceil(tasks / max(1, num_workers)))


class _Tasks(Dataset[Any]):
    """Task -> result, which a worker puts into its next place."""

    def __init__(self, work: Work, places: Places | None, places_of_a_worker: int):
        self.work = work
        self.places = places
        self.places_of_a_worker = places_of_a_worker
        self.done = 0

    def __getitem__(self, task: Any) -> Any:
        result = self.work[task]
        worker = get_worker_info()
        if worker is None or self.places is None:
            return result
        place = worker.id * self.places_of_a_worker + self.done % self.places_of_a_worker
        self.done += 1
        return self.places.put(place, result)


def _as_it_is(result: Any) -> Any:
    return result


def _context(preload: str) -> multiprocessing.context.BaseContext:
    """Workers are forked from a server that has imported everything and does nothing else.

    Forking the training process itself is fast, but copies locks that gloo's and CUDA's threads may hold; spawning is
    safe, but every worker imports torch anew (seconds, and hundreds of MB that are not shared).
    """
    context = multiprocessing.get_context("forkserver")
    modules = dict.fromkeys([__name__, "crossguard.data.loading.loader", preload])
    context.set_forkserver_preload([name for name in modules if name != "__main__"])
    return context


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """What is started inside does not see SIGINT and SIGTERM, which a terminal or a scheduler sends to every process
    of a job: the training process decides when to stop, and needs its workers until then."""
    resource_tracker.ensure_running()  # which unblocks both signals when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(trainer: int, worker: int) -> None:
    """Called first in each worker; `trainer` is the process that reads the results."""
    threading.Thread(target=_end_with, args=(trainer,), name="trainer-watch", daemon=True).start()


def _end_with(trainer: int) -> None:
    """End this worker when the trainer sends SIGTERM, as multiprocessing does to stop it, or is no more.

    The worker's parent is the server, which outlives the trainer as long as it has workers: neither the kernel's
    parent-death signal nor torch's own watch on the parent would notice.
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

"""Ends a rank that hangs: names it and what it was doing on the terminal, and writes the stacks of all its threads to
its log. The launcher then ends the job, or starts it again from the newest checkpoint.

Not watched are the start, where rank 0 may verify shards for hours, and the first step after it, where operators are
built and models compiled.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from crossguard.train import phases

MOST_SECONDS_BETWEEN_LOOKS = 10.0
# A rank that holds Python's lock is ended by the kernel so long after the others would have been.
KERNEL_SECONDS = 15.0


class _Now:
    """This process."""

    armed = False


def arm() -> None:
    """What takes long only once is done: phases are timed from here on."""
    _Now.armed = True


@contextmanager
def watching(timeout: float, rank: int, terminal: TextIO, log: TextIO) -> Iterator[None]:
    """Watch the phases of this process.

    Args:
        timeout: seconds that a phase may take; 0 does not watch.
        rank: whose process this is.
        terminal: where the one line goes.
        log: where the stacks go.
    """
    if not timeout:
        yield
        return
    # The handler is written in C and needs no lock; then the signal ends the process, as it does without a handler.
    faulthandler.register(signal.SIGALRM, file=log, all_threads=True, chain=True)
    stopped = threading.Event()
    watcher = threading.Thread(target=_watch, args=(timeout, rank, terminal, stopped), name="watchdog", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stopped.set()
        watcher.join()
        phases.rest()
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.unregister(signal.SIGALRM)


def _watch(timeout: float, rank: int, terminal: TextIO, stopped: threading.Event) -> None:
    between = min(timeout / 20, MOST_SECONDS_BETWEEN_LOOKS)
    while not stopped.wait(between):
        now = phases.current() if _Now.armed else None
        # Should this thread not get to run any more, the kernel's timer ends the process.
        signal.setitimer(signal.ITIMER_REAL, timeout + KERNEL_SECONDS if now else 0)
        if now and time.monotonic() - now[1] > timeout:
            terminal.write(
                f"crossguard: rank {rank}: hangs in '{now[0]}' for more than {timeout:g} s (train.step_timeout); "
                f"logs/rank-{rank:05d}.log has the stacks of its threads\n"
            )
            terminal.flush()
            # The launcher ends the job with the first rank that ends: the others have time to say where they are.
            time.sleep(2 * between)
            os.kill(os.getpid(), signal.SIGALRM)

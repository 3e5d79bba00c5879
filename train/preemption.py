"""What a rank does when it is asked to make room (SIGTERM, SIGUSR1).

As long as nothing would be lost, it ends at once. In between it only takes note: all ranks look at their notes together
where they talk to each other anyway, so that they stop at one step.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from crossguard.configs.errors import EXIT_PREEMPTED
from crossguard.configs.preemption import on_preemption


class _Rank:
    """This process: signals are the process's, so is this."""

    asked_at: float | None = None
    holding = False


def heeding() -> AbstractContextManager[None]:
    """Inside, the signals do what this module says."""
    return on_preemption(_receive)


@contextmanager
def holding() -> Iterator[None]:
    """Inside, something would be lost, or other ranks be left waiting: signals are only noted, see `asked`."""
    before, _Rank.holding = _Rank.holding, True
    try:
        yield
    finally:
        _Rank.holding = before
    if asked() and not _Rank.holding:  # Too late for the ranks to agree on, but what follows need not be begun.
        os._exit(EXIT_PREEMPTED)


def asked() -> bool:
    """Whether this rank was asked to stop."""
    return _Rank.asked_at is not None


def seconds_left(grace_seconds: float) -> float:
    """Of the time that a launcher gives its ranks to end once they are asked to; infinite as long as nobody asked."""
    return math.inf if _Rank.asked_at is None else _Rank.asked_at + grace_seconds - time.monotonic()


def _receive(_: signal.Signals) -> None:
    # Nor does a second signal cut short what the first one has set going.
    if not _Rank.holding:
        os._exit(EXIT_PREEMPTED)
    _Rank.asked_at = _Rank.asked_at or time.monotonic()

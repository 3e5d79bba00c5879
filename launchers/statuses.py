"""What the exit statuses of ranks mean, as another launcher passes them on."""

from __future__ import annotations

import signal

from crossguard.configs.errors import (
    EXIT_FAILED,
    EXIT_LOST_CONTACT,
    EXIT_OUT_OF_MEMORY,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    JobError,
    OutOfMemory,
    Preempted,
    UserError,
)
from crossguard.configs.preemption import SIGNALS


def status_of(statuses: set[int]) -> int:
    """The exit status that stands for those of several ranks: what has ended the first explains the others best.

    Args:
        statuses: of ranks; where signal N ended one, -N, 128 + N (as shells write it) or 256 - N (`sys.exit(-N)`).

    Returns:
        One of the statuses of `configs.errors`, 128 + N, or 0.
    """
    if EXIT_USER_ERROR in statuses:
        return EXIT_USER_ERROR
    killed = {sent for status in statuses if (sent := _signal_of(status)) is not None}
    if EXIT_PREEMPTED in statuses or killed & set(SIGNALS):
        return EXIT_PREEMPTED
    if EXIT_OUT_OF_MEMORY in statuses:
        return EXIT_OUT_OF_MEMORY
    if killed:
        return 128 + max(killed)
    if statuses - {0} == {EXIT_LOST_CONTACT}:
        return EXIT_LOST_CONTACT
    return EXIT_FAILED if statuses - {0} else 0


def outcome(status: int, *, asked: bool, who: str = "a rank") -> str:
    """What became of the ranks.

    Args:
        status: as `status_of` returns it.
        asked: whether the ranks were asked to stop.
        who: has ended with it.

    Returns:
        What was lost, where ranks were killed or lost contact; empty when all have done their work.

    Raises:
        UserError: a rank ended with exit status 2; it has said why.
        Preempted: the ranks were asked to stop, by this process or by another.
        OutOfMemory: the ranks are to be started again.
        JobError: a rank failed.
    """
    # The message of a rank is on the terminal already.
    if status == EXIT_USER_ERROR:
        raise UserError("")
    if status == EXIT_PREEMPTED or (asked and status != EXIT_FAILED):
        raise Preempted("preempted; start again and it goes on where it stopped")
    if status == 0:
        return ""
    if status == EXIT_OUT_OF_MEMORY:
        raise OutOfMemory(f"{who} was out of memory")
    if status == EXIT_LOST_CONTACT:
        return "ranks lost contact with each other"
    if (sent := _signal_of(status)) is not None:
        return f"{who} was ended by {explained(sent.name)}"
    raise JobError(f"{who} failed; see logs/ in the run directory")


def explained(name: str) -> str:
    """A signal's name with what is likely behind it."""
    return {"SIGKILL": "SIGKILL (is memory short?)", "SIGALRM": "SIGALRM (it hung)"}.get(name, name)


def _signal_of(status: int) -> signal.Signals | None:
    if status == 255:  # ssh, where it could not connect
        return None
    for number in (-status, status - 128, 256 - status):
        if 0 < number < 32:
            return signal.Signals(number)
    return None

"""A process that dies with the one that started it: SIGKILL of a launcher leaves no rank training on."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
from pathlib import Path

_PR_SET_PDEATHSIG = 1


# The environment variable in which the local launcher tells its ranks who it is: one that has ended before they ask
# would not be their parent any more.
LAUNCHER_PID = "CROSSGUARD_LAUNCHER_PID"


def die_with_parent() -> None:
    """Have the kernel send SIGKILL to this process when its parent ends (Linux; elsewhere nothing happens).

    The deepspeed launcher puts a process of its own between itself and the ranks; there the grandparent is watched too.
    """
    if sys.platform != "linux":
        return
    parent = int(os.environ.pop(LAUNCHER_PID, os.getppid()))
    be_told(signal.SIGKILL)
    if os.getppid() != parent:  # It had ended before the kernel was asked.
        os.kill(os.getpid(), signal.SIGKILL)
    if b"deepspeed.launcher.launch" in _command_line(parent):
        _die_with(_parent_of(parent))


def be_told(sent: signal.Signals) -> None:
    """Have the kernel send a signal to this process when its parent ends; holds for the program that it becomes."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, sent)


def _die_with(pid: int) -> None:
    """Watch a process that is not the parent; a daemon thread sleeps in the kernel until it ends."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:  # It ended before it could be watched.
        os.kill(os.getpid(), signal.SIGKILL)

    def wait() -> None:
        select.select([watched], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="launcher-watch", daemon=True).start()


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _parent_of(pid: int) -> int:
    # The name in parentheses may hold spaces; the parent is the second field after it.
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

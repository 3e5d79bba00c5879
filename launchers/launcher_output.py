"""What another launcher says: its own messages go to a log, the ranks' to the terminal; how the first of them ended."""

from __future__ import annotations

import re
import signal
import sys
import time
from pathlib import Path
from types import TracebackType

from crossguard.configs.errors import EXIT_PREEMPTED

# How long ranks may take to end where others have failed: some cannot know and would wait.
SECONDS_AFTER_A_FAILURE = 30.0


class LauncherOutput:
    """Sorts the lines of a launcher.

    Args:
        log: file for its own messages.
        own: how they begin.
        ended: those that say with which exit status (group 1), or of which signal in words, ranks somewhere have ended.
        grace_seconds: how long the others may take after ranks that have saved and ended.
    """

    def __init__(self, log: Path, own: str, ended: str, grace_seconds: float):
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("a", buffering=1)
        self._own, self._ended = re.compile(own), re.compile(ended)
        self._grace_seconds = grace_seconds
        self._first_at: float | None = None
        # Exit statuses of ranks that have ended badly.
        self.statuses: set[int] = set()

    def __enter__(self) -> LauncherOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()

    def hear(self, line: str) -> None:
        """Take a line."""
        ended = self._ended.match(line)
        if ended:
            self._first_at = self._first_at or time.monotonic()
            self.statuses.add(_status(ended.group(1)))
        if ended or self._own.match(line):
            print(line, file=self._log)
        else:
            print(line, file=sys.stderr, flush=True)

    def overdue(self) -> bool:
        """Whether ranks have ended badly, and the others have had time enough since."""
        if self._first_at is None:
            return False
        patience = self._grace_seconds if self.statuses == {EXIT_PREEMPTED} else SECONDS_AFTER_A_FAILURE
        return time.monotonic() - self._first_at > patience


def _status(said: str) -> int:
    """The exit status, as shells have it where a signal is named. SLURM has its own word for what lacked memory."""
    if said.isdecimal():
        return int(said)
    return 128 + {signal.strsignal(sent): sent for sent in signal.Signals}.get(said, signal.SIGKILL)

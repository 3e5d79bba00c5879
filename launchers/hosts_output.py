"""What DeepSpeed's launcher says: its own messages go to a log, the ranks' to the terminal; which hosts have ended."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from types import TracebackType

from crossguard.configs.errors import EXIT_PREEMPTED

# How long ranks of other hosts may take to end where those of one have failed: some cannot know and would wait.
SECONDS_AFTER_A_FAILURE = 30.0
_ENDED = re.compile(r"pdsh@\S+: \S+: ssh exited with exit code (\d+)")
_OWN = re.compile(r"\[\d{4}-\d\d-\d\d \S+ \[[A-Z]+\]")


class HostsOutput:
    """Sorts the lines of `deepspeed`."""

    def __init__(self, log: Path, grace_seconds: float):
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("a", buffering=1)
        self._grace_seconds = grace_seconds
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> HostsOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()

    def hear(self, line: str) -> None:
        """Take a line."""
        ended = _ENDED.match(line)
        if ended and self._first is None:
            self._first = int(ended.group(1)), time.monotonic()
        if ended or _OWN.match(line):
            print(line, file=self._log)
        else:
            print(line, file=sys.stderr, flush=True)

    def overdue(self) -> int | None:
        """The exit status of the host that failed first, when the others have had time enough since."""
        if self._first is None:
            return None
        status, at = self._first
        patience = self._grace_seconds if status == EXIT_PREEMPTED else SECONDS_AFTER_A_FAILURE
        return status if time.monotonic() - at > patience else None

"""Starting ranks, or a launcher with its ranks, from the pool of `rank_pool.py`: real processes, forked."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType

_LOCK = threading.Lock()
# Names the descriptor of a pool that another process has started, in whose stead this one asks.
POOL = "RANK_POOL"
# Seconds that anything may take, on the slowest of machines; pytest's own limit comes later, and would not show what was
# said.
LONGEST = 560.0


@cache
def pool() -> socket.socket:
    """Start the pool of this process, which ends with it; or take the one that it was given."""
    if given := os.environ.pop(POOL, None):
        return socket.socket(fileno=int(given))
    ours, theirs = socket.socketpair()
    with theirs:
        program = str(Path(__file__).with_name("rank_pool.py"))
        line = [sys.executable, program, str(theirs.fileno()), str(os.getpid())]
        subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is pytest's.
        )
    return ours


class RankJob:
    """Ranks that run together, or one launcher; leaving the block ends them.

    Args:
        line: what would follow `python`: a file or -m and a module, and arguments.
        ranks: how many; 0 starts a launcher, a single process that is no rank, whose own ranks are forked.
        environment: added to that of this process.
        cwd: where they run; by default where this process does.
    """

    def __init__(
        self,
        line: Sequence[str],
        ranks: int,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ):
        self._out, self._errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self._talk, theirs = socket.socketpair()
        with theirs, _LOCK:
            given = [theirs.fileno(), self._out.fileno(), self._errors.fileno()]
            socket.send_fds(pool(), [b"."], given)
        request = {"line": list(line), "ranks": ranks, "cwd": str(cwd or Path.cwd())}
        self._send(request | {"environment": {**os.environ, **(environment or {})}})
        self._unread = b""
        started = self._receive(None)
        assert started is not None, self.errors
        # The process in torchrun's place, and its ranks (or the launcher).
        self.job: int = started["job"]
        self.pids: list[int] = started["pids"]
        self.statuses: dict[int, int] = {}

    def __enter__(self) -> RankJob:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._talk.shutdown(socket.SHUT_WR)
        while self._talk.recv(1 << 16):  # Until the job has ended, and with it all of them.
            pass
        self._talk.close()

    def over(self, seconds: float = 0.0) -> bool:
        """Whether all end within a time; `statuses` has the exit statuses so far."""
        deadline = time.monotonic() + seconds
        while len(self.statuses) < len(self.pids):
            ended = self._receive(deadline)
            if ended is None:
                return False
            self.statuses[ended["rank"]] = ended["status"]
        return True

    def wait(self, seconds: float) -> list[int]:
        """Exit statuses by rank, negative for a signal.

        Raises:
            AssertionError: they do not end in time; with what they said.
        """
        assert self.over(seconds), f"not over after {seconds} s: {self.statuses}\n{self.said()}"
        return [self.statuses[rank] for rank in range(len(self.pids))]

    def signal(self, rank: int, sent: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a rank that may have ended."""
        if rank not in self.statuses and not self.over() and rank not in self.statuses:
            with contextlib.suppress(ProcessLookupError):  # It ended just now.
                os.kill(self.pids[rank], sent)

    @property
    def printed(self) -> str:
        """Standard output so far."""
        return _content(self._out.fileno())

    @property
    def errors(self) -> str:
        """Standard error so far."""
        return _content(self._errors.fileno())

    def said(self) -> str:
        """The end of both, to show."""
        return self.printed[-3000:] + self.errors[-6000:]

    def _send(self, message: dict[str, object]) -> None:
        self._talk.sendall(json.dumps(message).encode() + b"\n")

    def _receive(self, deadline: float | None) -> dict[str, int] | None:
        """The next message, or None when none comes in time or the job has ended."""
        while b"\n" not in self._unread:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._talk], [], [], wait)[0]:
                return None
            received = self._talk.recv(1 << 16)
            if not received:
                return None
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        message: dict[str, int] = json.loads(line)
        return message


def _content(file: int) -> str:
    # Processes write where the file stands, which reading must not move.
    return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")


def run_crossguard(
    arguments: Sequence[str], cwd: Path, *, status: int | None = 0, timeout: float = LONGEST
) -> subprocess.CompletedProcess[str]:
    """`crossguard ARGUMENTS` as a process of its own, forked, as are the ranks that it starts; by default it must succeed."""
    with RankJob(["-m", "crossguard.recipes.cli", *arguments], 0, cwd=cwd) as job:
        (ended,) = job.wait(timeout)
        assert status is None or ended == status, f"{arguments}\n{job.said()}"
        return subprocess.CompletedProcess(list(arguments), ended, job.printed, job.errors)


def alive(pid: int) -> bool:
    """Whether a process is there and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 60, between: float = 0.02) -> None:
    """Look again and again; what never comes true is a failure."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(between)

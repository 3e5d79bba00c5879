"""One job at a time on a run directory: kernel locks, which end with the processes that hold them.

Rank 0 holds `.lock` alone; the other ranks share `.lock.ranks`. A newcomer's rank 0 takes both before anything is
touched, so that it waits for every rank of an earlier job, also for those that outlive their rank 0.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from crossguard.configs.errors import JobError
from crossguard.train.ranks import Ranks

WAIT_SECONDS = 30.0


@contextlib.contextmanager
def run_lock(run_dir: Path, ranks: Ranks, wait: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold the run directory for this job; all ranks enter together.

    Raises:
        JobError: another job still holds it after `wait` seconds; the message names it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        error: Exception | None = None
        try:
            if ranks.is_first:
                deadline = time.monotonic() + wait
                first = held.enter_context((run_dir / ".lock").open("a+"))
                _take(first.fileno(), deadline, run_dir)
                with (run_dir / ".lock.ranks").open("a+") as others:
                    _take(others.fileno(), deadline, run_dir)
                first.truncate(0)
                first.write(json.dumps(_myself()))
                first.flush()
        except JobError as refused:
            error = refused
        ranks.agree(error)
        shared = held.enter_context((run_dir / ".lock.ranks").open("a+"))
        fcntl.flock(shared, fcntl.LOCK_SH)
        yield


def _take(descriptor: int, deadline: float, run_dir: Path) -> None:
    """Lock exclusively, waiting until `deadline`."""
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise JobError(
                    f"{run_dir}: in use by {_holder(run_dir)}; wait for it, stop it, or choose another run_dir"
                ) from None
            time.sleep(0.2)


def _holder(run_dir: Path) -> str:
    try:
        holder = json.loads((run_dir / ".lock").read_text())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError):
        return "another job"


def _myself() -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }

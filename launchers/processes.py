"""Ranks as processes of this machine: start them, watch them, pass signals on, end them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping

from crossguard.configs.parent_death import LAUNCHER_PID
from crossguard.configs.rank_store import STORE_DESCRIPTOR

SECONDS_BETWEEN_LOOKS = 0.1


class RankProcesses:
    """`python -m crossguard.train ARGUMENTS` for each rank, with the environment that torchrun would give it."""

    def __init__(self) -> None:
        self._ranks: list[subprocess.Popen[bytes]] = []

    def start(self, arguments: list[str], num_procs: int, environment: Mapping[str, str]) -> None:
        """Start them; what interrupts this leaves those that are started to `end`."""
        command = [sys.executable, "-m", "crossguard.train", *arguments]
        with socket.socket() as store:
            store.bind(("127.0.0.1", 0))
            store.listen(num_procs)
            common = {
                **environment,
                "WORLD_SIZE": str(num_procs),
                "LOCAL_WORLD_SIZE": str(num_procs),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.getsockname()[1]),
                STORE_DESCRIPTOR: str(store.fileno()),
                LAUNCHER_PID: str(os.getpid()),
            }
            for rank in range(num_procs):
                # In sessions of their own: what a terminal sends to this process is passed on by it alone.
                process = subprocess.Popen(
                    command,
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    pass_fds=(store.fileno(),) if rank == 0 else (),
                    start_new_session=True,
                )
                self._ranks.append(process)

    def wait(self, seconds: float) -> dict[int, int] | None:
        """Exit statuses by rank, negative for a signal, as soon as all have ended or one has ended badly.

        None when neither happens within `seconds`.
        """
        deadline = time.monotonic() + seconds
        while True:
            ended = self._ended()
            if len(ended) == len(self._ranks) or any(ended.values()):
                return self._ended()  # What had ended before is there now in any case.
            if time.monotonic() >= deadline:
                return None
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def send(self, sent: signal.Signals) -> None:
        """Send a signal to the ranks that are left."""
        for rank in self._ranks:
            rank.send_signal(sent)

    def end(self, seconds: float) -> None:
        """Ask the ranks that are left to end, and end them with all that they have started after `seconds`."""
        self.send(signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while len(self._ended()) < len(self._ranks) and time.monotonic() < deadline:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        for rank in self._ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
                rank.wait()

    def _ended(self) -> dict[int, int]:
        return {number: rank.returncode for number, rank in enumerate(self._ranks) if rank.poll() is not None}

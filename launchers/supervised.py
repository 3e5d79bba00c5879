"""Another launcher (torchrun's agent, deepspeed, srun) as a child process: start it, ask it to stop, give it time."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from crossguard.configs.errors import JobError, OutOfMemory, Preempted
from crossguard.configs.parent_death import be_told
from crossguard.configs.preemption import on_preemption
from crossguard.configs.schema import LauncherConfig
from crossguard.launchers.launcher_output import LauncherOutput
from crossguard.launchers.statuses import outcome, status_of

# Beyond `launcher.grace_seconds`: for what the other launcher itself does when its ranks have ended.
SECONDS_TO_END = 10.0
SECONDS_BETWEEN_ASKING = 5.0


@dataclass(frozen=True)
class Child:
    """Another launcher, and how to deal with it.

    Attributes:
        command: its command line.
        ask: asks all ranks to save and end; called when this process is asked to make room.
        ask_again: ask every few seconds until they have ended.
        kill: ends what the command has started elsewhere; called when it does not end in time.
        at_death: the signal that it gets when this process dies.
        environment: by default this process's.
        output: is told each line that it says; by default it speaks on the terminal itself.
    """

    command: list[str]
    ask: Callable[[subprocess.Popen[str]], None]
    ask_again: bool = False
    kill: Callable[[], None] = lambda: None
    at_death: signal.Signals = signal.SIGKILL
    environment: Mapping[str, str] | None = None
    output: LauncherOutput | None = None

    def start(self) -> subprocess.Popen[str]:
        """Start it, in a session of its own: what a terminal sends to this process reaches the ranks by `ask` alone."""
        return subprocess.Popen(
            self.command,
            env=self.environment,
            stdout=subprocess.PIPE if self.output else None,
            stderr=subprocess.STDOUT if self.output else None,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=functools.partial(be_told, self.at_death),
        )

    def overdue(self) -> bool:
        """Whether some ranks have ended badly long ago and others have not."""
        return self.output is not None and self.output.overdue()

    def statuses(self) -> set[int]:
        """Those of ranks that have ended badly, as far as it has said so."""
        return self.output.statuses if self.output else set()


def run(child: Child, grace_seconds: float) -> str:
    """Run another launcher to its end.

    Args:
        child: the launcher.
        grace_seconds: how long the ranks may take to save and end when they are asked to.

    Returns:
        What was lost, where ranks were killed or lost contact; empty when all have done their work.

    Raises:
        UserError: a rank ended with exit status 2; it has said why.
        Preempted: this process or a rank was asked to stop.
        OutOfMemory, JobError: see `outcome`.
    """
    asked: list[float] = []
    with on_preemption(lambda _: asked.append(time.monotonic())):
        process = child.start()
        listener = threading.Thread(target=_listen, args=(process, child.output), daemon=True)
        listener.start()
        try:
            _wait(child, process, asked, grace_seconds)
            in_time = process.poll() is not None
            if not in_time:
                child.kill()
        finally:
            _end(process)
            listener.join(SECONDS_TO_END)
    if in_time:
        return outcome(status_of(child.statuses() | {process.returncode}), asked=bool(asked))
    if not asked:  # Its own status is that of being ended here.
        return outcome(status_of(child.statuses()), asked=False)
    raise Preempted(
        f"preempted; the ranks had not ended within launcher.grace_seconds={grace_seconds:g}; "
        "start again and it goes on from the last checkpoint"
    )


def restarting(start: Callable[[list[str], int], str], arguments: list[str], config: LauncherConfig) -> None:
    """Start the ranks until they are done.

    Where one was lost they start again and go on from the newest checkpoint, up to `launcher.max_restarts` times. Where
    one was out of memory they start again as well, and that is not counted: each time they take fewer posts at once,
    and fail when it was a single one.

    Args:
        start: runs the ranks with the arguments, given how often one was lost, and says what was lost.
        arguments: of the ranks.
        config: the launcher's.

    Raises:
        JobError: lost once too often, and what `start` raises.
    """
    restarts = 0
    while True:
        try:
            lost = start(arguments, restarts)
        except OutOfMemory as error:
            again = f"{error}; starting again"
        else:
            if not lost:
                return
            if restarts == config.max_restarts:
                tried = f" (after {restarts} restarts)" if restarts else ""
                advice = "see logs/ in the run directory; start again, or set launcher.max_restarts"
                raise JobError(f"{lost}{tried}; {advice}")
            restarts += 1
            again = f"{lost}; restart {restarts} of {config.max_restarts}"
        # The checkpoints of the first start are not to be moved aside, whoever asked for that; the last word counts.
        arguments = [*arguments, "train.restart=false"]
        print(f"crossguard: {again}", file=sys.stderr, flush=True)


def _wait(child: Child, process: subprocess.Popen[str], asked: list[float], grace_seconds: float) -> None:
    """Until it has ended, or has had time enough to end."""
    passed_on: float | None = None
    while True:
        try:
            process.wait(0.2)
            return
        except subprocess.TimeoutExpired:
            now = time.monotonic()
            if asked and (passed_on is None or (child.ask_again and now - passed_on > SECONDS_BETWEEN_ASKING)):
                child.ask(process)
                passed_on = now
            if child.overdue() or (asked and now - asked[0] > grace_seconds + SECONDS_TO_END):
                return


def _listen(process: subprocess.Popen[str], output: LauncherOutput | None) -> None:
    if output is not None and process.stdout is not None:
        for line in process.stdout:
            output.hear(line.rstrip("\n"))


def _end(process: subprocess.Popen[str]) -> None:
    """End it, and all of its session, where something interrupted the waiting for it."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

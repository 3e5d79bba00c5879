"""Another launcher as a child process, played by a shell: asked to stop, overdue, or deaf."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from crossguard.configs.errors import JobError, Preempted
from crossguard.launchers import launcher_output, supervised
from crossguard.launchers.launcher_output import LauncherOutput
from crossguard.launchers.supervised import Child, run

WAIT = "while :; do sleep .05; done"


def ask(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGUSR1)


def asked_soon(name: signal.Signals = signal.SIGTERM) -> threading.Timer:
    """This process gets a signal in a moment."""
    timer = threading.Timer(0.3, os.kill, (os.getpid(), name))
    timer.start()
    return timer


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "SECONDS_TO_END", 0.5)
    monkeypatch.setattr(supervised, "SECONDS_BETWEEN_ASKING", 0.2)
    monkeypatch.setattr(launcher_output, "SECONDS_AFTER_A_FAILURE", 0.2)


def test_what_is_asked_of_this_process_is_asked_of_the_ranks() -> None:
    timer = asked_soon(signal.SIGUSR1)
    with pytest.raises(Preempted, match="goes on where it stopped"):
        run(Child(["bash", "-c", f"trap 'exit 75' USR1; {WAIT}"], ask=ask), grace_seconds=60)
    timer.join()


def test_ranks_that_did_not_hear_it_are_asked_again() -> None:
    timer = asked_soon()
    deaf_at_first = f"n=0; trap 'n=$((n+1)); if [ $n = 3 ]; then exit 75; fi' USR1; {WAIT}"
    with pytest.raises(Preempted, match="goes on where it stopped"):
        run(Child(["bash", "-c", deaf_at_first], ask=ask, ask_again=True), grace_seconds=60)
    timer.join()


def test_ranks_that_do_not_end_in_time_are_ended_everywhere() -> None:
    timer = asked_soon()
    killed: list[str] = []
    child = Child(["bash", "-c", f"trap '' USR1 TERM; {WAIT}"], ask=ask, kill=lambda: killed.append("elsewhere"))
    with pytest.raises(Preempted, match=r"had not ended within launcher.grace_seconds=0.2"):
        run(child, grace_seconds=0.2)
    timer.join()
    assert killed == ["elsewhere"]


def test_ranks_that_wait_for_failed_ones_are_ended(tmp_path: Path) -> None:
    killed: list[str] = []
    with LauncherOutput(tmp_path / "log", own="own", ended=r"host \S+ ended with (\d+)", grace_seconds=60) as output:
        child = Child(
            ["bash", "-c", f"echo host b ended with 1; echo host c ended with 77 >&2; {WAIT}"],
            ask=ask,
            kill=lambda: killed.append("elsewhere"),
            output=output,
        )
        with pytest.raises(JobError, match=re.escape("a rank failed; see logs/ in the run directory")):
            run(child, grace_seconds=60)
    assert killed == ["elsewhere"]
    assert output.statuses == {1, 77}


def test_what_ranks_are_lost_by_is_told() -> None:
    assert run(Child(["bash", "-c", "exit 137"], ask=ask), 60) == "a rank was ended by SIGKILL (is memory short?)"
    assert run(Child(["true"], ask=ask), 60) == ""

"""Another launcher as a child process, played by a shell: asked to stop, overdue, or deaf."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import pytest

from crossguard.configs.errors import JobError, Preempted
from crossguard.launchers import launcher_output, supervised
from crossguard.launchers.launcher_output import LauncherOutput
from crossguard.launchers.supervised import Child, run

WAIT = "while :; do sleep .05; done"
# The shell itself has this process asked, as soon as it is ready for what follows.
PREEMPT = f"kill -TERM $PPID; {WAIT}"


def ask(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGUSR1)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "SECONDS_TO_END", 0.5)
    monkeypatch.setattr(supervised, "SECONDS_BETWEEN_ASKING", 0.2)
    monkeypatch.setattr(launcher_output, "SECONDS_AFTER_A_FAILURE", 0.2)


def test_what_is_asked_of_this_process_is_asked_of_the_ranks() -> None:
    with pytest.raises(Preempted, match="goes on where it stopped"):
        run(Child(["bash", "-c", f"trap 'exit 75' USR1; kill -USR1 $PPID; {WAIT}"], ask=ask), grace_seconds=60)


def test_ranks_that_did_not_hear_it_are_asked_again() -> None:
    deaf_at_first = f"n=0; trap 'n=$((n+1)); if [ $n = 3 ]; then exit 75; fi' USR1; {PREEMPT}"
    with pytest.raises(Preempted, match="goes on where it stopped"):
        run(Child(["bash", "-c", deaf_at_first], ask=ask, ask_again=True), grace_seconds=60)


def test_ranks_that_do_not_end_in_time_are_ended_everywhere() -> None:
    killed: list[str] = []
    child = Child(["bash", "-c", f"trap '' USR1 TERM; {PREEMPT}"], ask=ask, kill=lambda: killed.append("elsewhere"))
    with pytest.raises(Preempted, match=r"had not ended within launcher.grace_seconds=0.2"):
        run(child, grace_seconds=0.2)
    assert killed == ["elsewhere"]


def test_ranks_that_wait_for_failed_ones_are_ended(tmp_path: Path) -> None:
    killed: list[str] = []
    told = "host b ended with 1\\nhost c ended with 77\\n"  # At once: the first one sets the time that is left.
    with LauncherOutput(tmp_path / "log", own="own", ended=r"host \S+ ended with (\d+)", grace_seconds=60) as output:
        child = Child(
            ["bash", "-c", f"echo own >&2; printf '{told}'; {WAIT}"],
            ask=ask,
            kill=lambda: killed.append("elsewhere"),
            output=output,
        )
        with pytest.raises(JobError, match=re.escape("a rank failed; see logs/ in the run directory")):
            run(child, grace_seconds=60)
    assert killed == ["elsewhere"]
    assert output.statuses == {1, 77}
    assert (tmp_path / "log").read_text() == "own\nhost b ended with 1\nhost c ended with 77\n"


def test_what_ranks_are_lost_by_is_told() -> None:
    assert run(Child(["bash", "-c", "exit 137"], ask=ask), 60) == "a rank was ended by SIGKILL (is memory short?)"
    assert run(Child(["true"], ask=ask), 60) == ""

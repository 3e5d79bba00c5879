"""Progress: a bar on a terminal, plain lines elsewhere, silence on every rank but the first."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from crossguard.configs import progress as module
from crossguard.configs.progress import progress


def test_lines_say_how_far_how_fast_and_how_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    with progress("build", 40, "posts", done=10) as shown:
        for _ in range(3):
            shown.advance(5, note="shard 1")
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("build: 25/40 posts, ")
    assert "s left" in lines[-1]
    assert lines[-1].endswith("shard 1")
    assert not any("\r" in line for line in lines)


def test_only_the_first_rank_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("train", 10, "steps", speak=False) as shown:
        shown.advance()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_with_rate_and_time_left() -> None:
    program = (
        "from crossguard.configs.progress import progress\n"
        "with progress('build', 4, 'posts') as shown:\n"
        "    for _ in range(4): shown.advance(note='here')\n"
    )
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    subprocess.run([sys.executable, "-c", program], stderr=terminal, check=True)
    os.close(terminal)
    printed = os.read(reader, 65536)
    os.close(reader)
    assert b"\r" in printed
    assert b"posts/s" in printed
    assert b"4/4" in printed

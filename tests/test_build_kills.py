"""A build that is killed at any moment, with all its processes, goes on to the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

KILLS = 25
# A kill leaves the kernel with what was written: waiting for a disk, which is most of a small build, would show nothing.
MEMORY = Path("/dev/shm")


@pytest.mark.parametrize("kind", ["new", "append"])
def test_random_kills_of_a_build_on_two_processes(kind: str) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        line = [sys.executable, str(Path(__file__).with_name("kill_job.py")), folder, str(KILLS), kind]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

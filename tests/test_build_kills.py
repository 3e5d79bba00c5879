"""A build that is killed at any moment, with all its processes, goes on to the same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 25


@pytest.mark.parametrize("kind", ["new", "append"])
def test_random_kills_of_a_build_on_two_processes(tmp_path: Path, kind: str) -> None:
    line = [sys.executable, str(Path(__file__).with_name("kill_job.py")), str(tmp_path), str(KILLS), kind]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

"""The lines that a run directory keeps of its training: metrics.jsonl, samples/, quarantine.jsonl."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from crossguard.configs.errors import JobError

STAGING = ".staging-"


class LineLog:
    """Appends JSON objects, one a line; each line is handed to the kernel at once."""

    def __init__(self, path: Path):
        self._path = path
        self._file: FileIO | None = None

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one object; the first makes the file. Floats keep every digit.

        Raises:
            JobError: the disk refuses (it is full).
        """
        content = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                # Unbuffered and appending: a line of one process is not torn by one of another, nor lost with it.
                self._file = FileIO(self._path, "a")
            while content:  # A disk that becomes full takes the beginning.
                content = content[self._file.write(content) :]
        except OSError as error:
            raise JobError(
                f"{self._path}: cannot write ({error.strerror}); free space there, then start again to resume from the"
                " last checkpoint"
            ) from error

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def metrics_file(run_dir: Path) -> Path:
    """Every logged step and evaluation."""
    return run_dir / "metrics.jsonl"


def samples_file(run_dir: Path, rank: int) -> Path:
    """The ids of each step as delivered to a rank."""
    return run_dir / "samples" / f"rank-{rank:05d}.jsonl"


def cut_after(run_dir: Path, step: int) -> None:
    """Remove the lines of steps after `step` (the restored one): they will be written again, each step stands once."""
    files = (metrics_file(run_dir), run_dir / "quarantine.jsonl", *sorted((run_dir / "samples").glob("rank-*.jsonl")))
    for file in files:
        if file.is_file():
            _cut(file, step)


def _cut(file: Path, step: int) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if len(kept) < len(lines):
        staging = file.with_name(f"{STAGING}{file.name}")
        with staging.open("wb") as opened:
            opened.writelines(kept)
            opened.flush()
            os.fsync(opened.fileno())
        staging.replace(file)


def _step_of(line: bytes) -> float:
    """A line that a killed process left half-written is later than any step."""
    try:
        # A post that the build or an evaluation refused has no step, and stays.
        return int(json.loads(line).get("step", 0)) if line.endswith(b"\n") else float("inf")
    except (ValueError, AttributeError, TypeError):
        return float("inf")

"""Work of a build as a SLURM job array: on any node of the cluster, all of which see the folders.

Tasks and results are handed over as files in a folder of the working directory. `python -m
crossguard.data.shards.slurm_array FOLDER INDEX` does the share of one job of the array.
"""

from __future__ import annotations

import pickle
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from crossguard.configs.errors import JobError, UserError
from crossguard.data.shards.executor import DIED, call_where_seen
from crossguard.data.shards.files import write_atomic

Task = TypeVar("Task")
Result = TypeVar("Result")

WORK = "work"
SECONDS_BETWEEN_LOOKS = 0.5
# What a job wrote at its end may be seen here a while later, on file systems that cache.
SECONDS_TO_SEE = 10.0


class SlurmArray:
    """At most `num_workers` jobs at a time; each does every `num_workers`-th task."""

    def __init__(self, num_workers: int, options: list[str]):
        self.num_workers = num_workers
        self.options = options

    def run(
        self, function: Callable[[Task], Result], tasks: Sequence[Task], needed: Sequence[Path] = ()
    ) -> Iterator[tuple[Task, Result]]:
        """See `Executor`."""
        if not tasks:
            return
        jobs = min(self.num_workers, len(tasks))
        folder = Path(tempfile.mkdtemp(prefix=".build-array-", dir=Path.cwd()))
        job = None
        try:
            paths = [str(path.absolute()) for path in needed]
            (folder / WORK).write_bytes(pickle.dumps((function, list(tasks), paths, jobs)))
            job = self._submit(folder, jobs)
            for number in _as_they_come(folder, len(tasks), job):
                result, error = pickle.loads((folder / f"{number}.done").read_bytes())
                if error is not None:
                    raise error
                yield tasks[number], result
        finally:
            if job is not None:
                subprocess.run(["scancel", job], capture_output=True, check=False)
            shutil.rmtree(folder, ignore_errors=True)

    def _submit(self, folder: Path, jobs: int) -> str:
        """Hand the array to SLURM; returns its number."""
        command = [sys.executable, "-m", "crossguard.data.shards.slurm_array", str(folder)]
        script = f'#!/bin/bash\nexec {shlex.join(command)} "$SLURM_ARRAY_TASK_ID"\n'
        options = [f"--array=0-{jobs - 1}", "--ntasks=1", "--job-name=crossguard-build", f"--output={folder}/%a.out"]
        line = ["sbatch", "--parsable", *options, *self.options]
        done = subprocess.run(line, input=script, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise UserError(f"build.executor=slurm: {said[0]}")
        return done.stdout.strip().partition(";")[0]


def _as_they_come(folder: Path, count: int, job: str) -> Iterator[int]:
    """The numbers of the tasks whose results are there.

    Raises:
        JobError: the jobs are gone, and results are missing.
    """
    waiting = set(range(count))
    gone_at: float | None = None
    while True:
        arrived = {number for number in waiting if (folder / f"{number}.done").exists()}
        yield from sorted(arrived)
        waiting -= arrived
        if not waiting:
            return
        if arrived or _is_active(job):
            gone_at = None
        elif gone_at is None:
            gone_at = time.monotonic()
        elif time.monotonic() - gone_at > SECONDS_TO_SEE:
            raise JobError(DIED)
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _is_active(job: str) -> bool:
    """Whether jobs of the array wait or run; also where SLURM does not answer for a moment."""
    line = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    return bool(done.stdout.strip()) if done.returncode == 0 else "Invalid job id" not in done.stderr


def _work(folder: Path, index: int) -> None:
    """Do the share of a job of the array; the first error ends it."""
    function, tasks, needed, jobs = pickle.loads((folder / WORK).read_bytes())
    for number in range(index, len(tasks), jobs):
        outcome: tuple[Any, Exception | None]
        try:
            outcome = call_where_seen(function, tasks[number], needed), None
        except Exception as error:
            outcome = None, error
        write_atomic(folder / f"{number}.done", pickle.dumps(outcome))
        if outcome[1] is not None:
            return


if __name__ == "__main__":
    _work(Path(sys.argv[1]), int(sys.argv[2]))

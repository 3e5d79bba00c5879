"""Environment variables of a job.

`python -m crossguard.launchers.environment FILE PATTERN…` writes those whose names fit, as the ranks of another machine
take them: into a file that only the user may read.
"""

from __future__ import annotations

import fnmatch
import json
import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from crossguard.configs.cores import usable_cores
from crossguard.configs.schema import LauncherConfig


def environment_of(config: LauncherConfig, num_procs: int) -> dict[str, str]:
    """What each of `num_procs` ranks of a machine gets, beside what there is: threads, and the configuration's own."""
    threads = config.threads_per_proc or max(1, usable_cores() // num_procs)
    return {"OMP_NUM_THREADS": str(threads)} | config.environment


def matching(patterns: Iterable[str]) -> dict[str, str]:
    """The variables of this process whose names fit a pattern (`NCCL_*`)."""
    names = [name for name in os.environ if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    # Which GPUs a rank of another machine sees is for that machine to say.
    return {name: os.environ[name] for name in names if name != "CUDA_VISIBLE_DEVICES"}


@contextmanager
def environment_file(run_dir: Path, variables: dict[str, str]) -> Iterator[Path]:
    """A file with variables that only the user may read, there as long as ranks may start."""
    file = run_dir.absolute() / f".environment-{secrets.token_hex(8)}.json"
    _write(file, variables)
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def _write(file: Path, variables: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        json.dump(variables, opened)


def main(file: str, *patterns: str) -> None:
    """Write the file."""
    try:
        _write(Path(file), matching(patterns))
    except FileExistsError:
        sys.exit(f"crossguard: {file}: left by another start of this job; remove it when that has ended")


if __name__ == "__main__":
    main(*sys.argv[1:])

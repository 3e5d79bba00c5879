"""Environment variables of a job.

`python -m crossguard.launchers.environment FILE NAME…` writes those that are named as the ranks of another machine take
them: into a file that only the user may read.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crossguard.configs.cores import usable_cores
from crossguard.configs.schema import LauncherConfig


def environment_of(config: LauncherConfig, num_procs: int) -> dict[str, str]:
    """What each of `num_procs` ranks of a machine gets, beside what there is: threads, and the configuration's own."""
    threads = config.threads_per_proc or max(1, usable_cores() // num_procs)
    return {"OMP_NUM_THREADS": str(threads)} | config.environment


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


def main(file: str, *names: str) -> None:
    """Write the file."""
    if missing := [name for name in names if name not in os.environ]:
        sys.exit(
            f"crossguard: {', '.join(missing)}: not set, which would be handed to the ranks; set it, or print again"
        )
    try:
        _write(Path(file), {name: os.environ[name] for name in names})
    except FileExistsError:
        sys.exit(f"crossguard: {file}: left by another start of this job; remove it when that has ended")


if __name__ == "__main__":
    main(*sys.argv[1:])

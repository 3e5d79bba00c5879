"""Environment variables of a job."""

from __future__ import annotations

import json
import os
import secrets
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
    run_dir.mkdir(parents=True, exist_ok=True)
    file = run_dir.absolute() / f".environment-{secrets.token_hex(8)}.json"
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        json.dump(variables, opened)
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)

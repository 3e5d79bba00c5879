"""Environment variables of a job."""

from __future__ import annotations

import os

from crossguard.configs.schema import LauncherConfig


def environment_of(config: LauncherConfig, num_procs: int) -> dict[str, str]:
    """What each of `num_procs` ranks of a machine gets, beside what there is: threads, and the configuration's own."""
    threads = config.threads_per_proc or max(1, (os.cpu_count() or 1) // num_procs)
    return {"OMP_NUM_THREADS": str(threads)} | config.environment

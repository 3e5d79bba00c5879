"""The CPU cores that this process may use, which are not always all of the machine."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# What a container may use of the cores, as "QUOTA PERIOD" in microseconds; "max" where nothing limits it (cgroup v2).
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """At least 1: those that this process is bound to (taskset, SLURM), or what its container's quota is worth."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = map(int, QUOTA.read_text().split())
        cores = min(cores, quota // period)
    return max(1, cores)

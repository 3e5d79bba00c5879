"""Ranks on this machine, started and watched by torchrun's elastic agent inside this process."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from pathlib import Path

from crossguard.configs.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, JobError, Preempted, UserError


def launch(arguments: list[str], num_procs: int, threads_per_proc: int | None) -> None:
    """Run `python -m crossguard.train ARGUMENTS` on `num_procs` ranks and wait for the end.

    Raises:
        UserError: a rank ended with exit status 2; it has said why.
        Preempted: a rank ended with exit status 75.
        JobError: a rank ended in any other way.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ["OMP_NUM_THREADS"] = str(threads_per_proc or max(1, (os.cpu_count() or 1) // num_procs))
    logs = tempfile.TemporaryDirectory(prefix="crossguard-")
    agent = LaunchConfig(
        logs_specs=DefaultLogsSpecs(log_dir=logs.name),
        run_id=f"crossguard-{os.getpid()}",
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_procs,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        with logs:
            elastic_launch(agent, sys.executable)("-m", "crossguard.train", *arguments)
    except ChildFailedError as error:
        statuses = {failure.exitcode for failure in error.failures.values()}
        raise _outcome(statuses, error) from None
    except SignalException as error:
        # The agent has passed the signal on to the ranks and waited for them.
        raise JobError(f"stopped by {error.sigval.name}; start again and it goes on from the last checkpoint") from None


def count_gpus() -> int:
    """GPUs that the driver lists, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() and device.strip() != "-1"])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _outcome(statuses: set[int], error: Exception) -> UserError | Preempted | JobError:
    # The message of a rank is on the terminal already: the first rank prints it.
    if EXIT_USER_ERROR in statuses:
        return UserError("")
    if EXIT_PREEMPTED in statuses:
        return Preempted("")
    ended = ", ".join(str(status) for status in sorted(statuses))
    return JobError(f"a rank ended with exit status {ended}; see logs/ in the run directory")

"""Ranks on this machine: watched, started again when one is lost, and given time to save when the job is preempted.

torchrun's agent (`launcher=torchrun`) would import torch before it starts them, seconds later, and knows neither which
errors are worth another start nor how to use fewer ranks.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from crossguard.configs.errors import EXIT_PREEMPTED, Preempted
from crossguard.configs.preemption import on_preemption
from crossguard.configs.schema import LauncherConfig
from crossguard.launchers.environment import environment_of
from crossguard.launchers.processes import RankProcesses
from crossguard.launchers.statuses import outcome, status_of
from crossguard.launchers.supervised import restarting

# How long the others may take to end when a rank is lost: without it they can save nothing.
SECONDS_TO_END = 5.0


def launch(arguments: list[str], num_procs: int, config: LauncherConfig, shared_out: int) -> None:
    """Run `python -m crossguard.train ARGUMENTS` on `num_procs` ranks and wait for the end.

    A rank that is lost, killed by a signal or hanging, ends the others; see `restarting`.

    Args:
        arguments: of the ranks.
        num_procs: ranks to begin with.
        config: the launcher's.
        shared_out: what any number of ranks must divide (the posts of a step); 0 where any number will do.

    Raises:
        UserError: a rank ended with exit status 2; it has said why.
        Preempted: this process or a rank was asked to stop.
        JobError: a rank failed, or was lost once too often.
    """

    def start(arguments: list[str], restarts: int) -> str:
        # Once may be an accident; a rank that is lost again may lack a place to live.
        fewer = max(restarts - 1, 0) if config.elastic else 0
        divisors = [count for count in range(num_procs - 1, 0, -1) if shared_out % count == 0]
        left = [num_procs, *divisors][: fewer + 1][-1]
        if left < num_procs:
            print(f"crossguard: going on with {left} of {num_procs} ranks", file=sys.stderr, flush=True)
        return _run(arguments, left, config)

    restarting(start, arguments, config)


def count_gpus() -> int:
    """GPUs that the driver lists, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() and device.strip() != "-1"])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _run(arguments: list[str], num_procs: int, config: LauncherConfig) -> str:
    """One start of the ranks; says which rank was lost and why, or nothing when all have done their work."""
    ranks = RankProcesses()
    asked_at: list[float] = []

    def pass_on(sent: signal.Signals) -> None:
        asked_at.append(time.monotonic())
        ranks.send(sent)

    patience = SECONDS_TO_END
    try:
        with on_preemption(pass_on):
            ranks.start(arguments, num_procs, os.environ | environment_of(config, num_procs))
            if asked_at:  # while some were not there yet
                ranks.send(signal.SIGTERM)
            while (ended := ranks.wait(1.0)) is None:
                if asked_at and time.monotonic() - asked_at[0] > config.grace_seconds:
                    patience = 0
                    raise Preempted(
                        f"preempted; the ranks had not ended within launcher.grace_seconds={config.grace_seconds:g}; "
                        "start again and it goes on from the last checkpoint"
                    )
            if EXIT_PREEMPTED in ended.values():
                patience = config.grace_seconds  # Nothing is left to save, but logs and tracker are still closed.
            return _outcome(ended, asked=bool(asked_at))
    finally:
        ranks.end(patience)


def _outcome(ended: dict[int, int], asked: bool) -> str:
    """What the exit statuses of the ranks that ended first mean."""
    status = status_of(set(ended.values()))
    # The others may have ended as well, of having lost this one.
    first = next((rank for rank, own in ended.items() if status_of({own}) == status), 0)
    return outcome(status, asked=asked, who=f"rank {first}")

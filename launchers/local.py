"""Ranks on this machine: watched, started again when one is lost, and given time to save when the job is preempted."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from crossguard.configs.errors import (
    EXIT_FAILED,
    EXIT_LOST_CONTACT,
    EXIT_OUT_OF_MEMORY,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    JobError,
    OutOfMemory,
    Preempted,
    UserError,
)
from crossguard.configs.preemption import SIGNALS, on_preemption
from crossguard.configs.schema import LauncherConfig
from crossguard.launchers.environment import environment_of
from crossguard.launchers.processes import RankProcesses
from crossguard.launchers.statuses import explained

# How long the others may take to end when a rank is lost: without it they can save nothing.
SECONDS_TO_END = 5.0


def launch(arguments: list[str], num_procs: int, config: LauncherConfig, shared_out: int) -> None:
    """Run `python -m crossguard.train ARGUMENTS` on `num_procs` ranks and wait for the end.

    A rank that is lost, killed by a signal or hanging, ends the others; they start again up to `launcher.max_restarts`
    times and go on from the newest checkpoint. Where one was out of memory they start again as well, and that is not
    counted: each time they take fewer posts at once, and fail when it was a single one.

    Args:
        arguments: of the ranks.
        num_procs: ranks to begin with.
        config: the launcher's.
        shared_out: what any number of ranks must divide (the posts of a step).

    Raises:
        UserError: a rank ended with exit status 2; it has said why.
        Preempted: this process or a rank was asked to stop.
        JobError: a rank failed, or was lost once too often.
    """
    restarts = 0
    while True:
        try:
            lost = _run(arguments, num_procs, config)
        except OutOfMemory as error:
            _say(f"{error}; starting again")
        else:
            if not lost:
                return
            if restarts == config.max_restarts:
                tried = f" (after {restarts} restarts)" if restarts else ""
                advice = "see logs/ in the run directory; start again, or set launcher.max_restarts"
                raise JobError(f"{lost}{tried}; {advice}")
            restarts += 1
            # Once may be an accident; a rank that is lost again may lack a place to live.
            if config.elastic and restarts > 1:
                num_procs = next((n for n in range(num_procs - 1, 0, -1) if shared_out % n == 0), num_procs)
            _say(f"{lost}; restart {restarts} of {config.max_restarts} on {num_procs} ranks")
        # The checkpoints of the first start are not to be moved aside, whoever asked for that; the last word counts.
        arguments = [*arguments, "train.restart=false"]


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
    # The message of a rank is on the terminal already: the first rank prints it.
    statuses = set(ended.values())
    if EXIT_USER_ERROR in statuses:
        raise UserError("")
    # A rank is ended by the signal itself before it has learned to heed it.
    preempted = asked and EXIT_FAILED not in statuses
    if preempted or statuses & {EXIT_PREEMPTED, *(-name for name in SIGNALS)}:
        raise Preempted("preempted; start again and it goes on where it stopped")
    # The others may have ended as well, of having lost this one.
    if short := [rank for rank, status in ended.items() if status == EXIT_OUT_OF_MEMORY]:
        raise OutOfMemory(f"rank {short[0]} was out of memory")
    killed = {rank: signal.Signals(-status).name for rank, status in ended.items() if status < 0}
    if killed:
        return ", ".join(f"rank {rank} was ended by {explained(name)}" for rank, name in killed.items())
    if statuses - {0} == {EXIT_LOST_CONTACT}:
        return "ranks lost contact with each other"
    failed = {rank: status for rank, status in ended.items() if status}
    if failed:
        what = ", ".join(f"rank {rank} ended with exit status {status}" for rank, status in failed.items())
        raise JobError(f"{what}; see logs/ in the run directory")
    return ""


def _say(message: str) -> None:
    print(f"crossguard: {message}", file=sys.stderr, flush=True)

"""Jobs as SLURM gets them: one script that runs all stages, saves in time, submits itself again and goes on.

SLURM sends SIGUSR1 to the script some time before the time limit, and SIGTERM when it takes the job's place away; the
script hands both on. `crossguard run` then ends with status 75, on which the script has SLURM requeue the job.
"""

from __future__ import annotations

import os
import re
import shlex

from crossguard.configs.errors import JobError, UserError
from crossguard.configs.restarted import RESTARTED
from crossguard.configs.schema import LauncherConfig
from crossguard.configs.suggest import did_you_mean
from crossguard.launchers import procs_per_node
from crossguard.launchers.programs import need, output
from crossguard.launchers.work import CROSSGUARD, Work

# What saves must also end before the limit.
SECONDS_OF_SLACK = 90
# SLURM looks at time limits once a minute: its signal may come so much earlier.
SECONDS_EARLY = 60
ELSEWHERE = "submit from a machine of the cluster, or see what would run with --dry-run"

_BODY = """
# What the first start has moved aside (train.restart=true) is not moved aside again.
if [ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ]; then export {restarted}=1; fi

{command} "$@" &
job=$!
if [ "$asked" ]; then kill -USR1 "$job"; fi  # while there was no job yet
while kill -0 "$job" 2>/dev/null; do wait "$job"; done  # a signal interrupts the wait
wait "$job"
status=$?

# Preempted, be it before the job could heed a signal, and neither cancelled nor requeued by anyone else.
case "$status" in 75 | 138 | 143)
  if scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then scontrol requeue "$SLURM_JOB_ID"; fi
esac
exit "$status"
"""


def script(works: list[Work], config: LauncherConfig, *, output_folder: str, command: str = "run") -> str:
    """The script of a job, or of the jobs of a sweep as an array.

    Args:
        works: the jobs.
        config: the launcher's.
        output_folder: where SLURM writes what the jobs print.
        command: of crossguard; `build` runs on one node, without GPUs.

    Raises:
        UserError: the time limit is so short that the job would be asked to stop as soon as it starts.
    """
    _check_time(config)
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in _options(works, config, output_folder, command)), ""]
    # First of all: a signal that comes before would end the script.
    lines += ["asked= job=", """trap 'asked=yes; [ -z "$job" ] || kill -USR1 "$job" 2>/dev/null' USR1 TERM"""]
    if config.slurm.modules:
        # A job without what it needs would fail later, and less clearly.
        lines.append(f"module load {shlex.join(config.slurm.modules)} || exit 2")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in config.environment.items()]
    if len(works) == 1:
        lines.append(f"set -- {shlex.join(works[0].arguments)}")
    else:
        lines.append('case "$SLURM_ARRAY_TASK_ID" in')
        lines += [f"  {number}) set -- {shlex.join(work.arguments)} ;;" for number, work in enumerate(works)]
        lines.append("esac")
    return "\n".join(lines) + _BODY.format(restarted=RESTARTED, command=shlex.join([*CROSSGUARD, command]))


def _options(works: list[Work], config: LauncherConfig, output_folder: str, command: str) -> list[str]:
    slurm, ranked = config.slurm, command == "run"
    job = "%A_%a" if len(works) > 1 else "%j"
    options = {
        "job-name": works[0].name,
        "chdir": os.getcwd(),
        "output": f"{output_folder.replace('%', '%%')}/slurm-{job}.out",
        "open-mode": "append",
        "nodes": config.nodes if ranked else 1,
        "ntasks-per-node": procs_per_node(config) if ranked else 1,
        "cpus-per-task": slurm.cpus_per_task,
        "gpus-per-node": gpus if ranked and (gpus := _gpus(config)) else None,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time,
        "signal": f"B:USR1@{config.grace_seconds + SECONDS_OF_SLACK:.0f}",
    }
    if len(works) > 1:
        at_a_time = f"%{slurm.array_parallelism}" if slurm.array_parallelism else ""
        options["array"] = f"0-{len(works) - 1}{at_a_time}"
    given = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    return [*given, "--requeue", *map(shlex.quote, slurm.options)]


def _check_time(config: LauncherConfig) -> None:
    time = config.slurm.time
    if time is None:
        return
    needed = config.grace_seconds + SECONDS_OF_SLACK + SECONDS_EARLY
    if (seconds := _seconds(time)) is None:
        raise UserError(f"launcher.slurm.time={time}: must be MINUTES, HH:MM:SS or DAYS-HH:MM:SS")
    if seconds <= needed:
        raise UserError(
            f"launcher.slurm.time={time}: SLURM would ask the job to stop at once, up to {needed:.0f} s before it is"
            " over (launcher.grace_seconds and what SLURM takes); give it more time"
        )


def _seconds(time: str) -> int | None:
    """A time limit as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        return None
    days, dash, clock = time.rpartition("-")
    numbers = [int(number) for number in clock.split(":")]
    if dash:  # from the hours on
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:  # up to the seconds; a number alone is minutes
        hours, minutes, seconds = [0, *numbers, 0] if len(numbers) == 1 else [*([0] * (3 - len(numbers))), *numbers]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def _gpus(config: LauncherConfig) -> int:
    return config.num_procs or 0 if config.gpus_per_node is None else config.gpus_per_node


def submit(text: str, config: LauncherConfig, *, before: str | None = None) -> str:
    """Hand a script to SLURM, to begin at once or when the job `before` has succeeded; returns the job's number.

    Raises:
        UserError: sbatch is missing, there is no such partition, or SLURM refuses the job.
    """
    need("sbatch", ELSEWHERE)
    if config.slurm.partition:
        known = output(["sinfo", "--noheader", "--format=%R"]).split()
        for partition in config.slurm.partition.split(","):
            if partition not in known:
                hint = did_you_mean(partition, known)
                raise UserError(f"launcher.slurm.partition={partition}: SLURM has no such partition; {hint}")
    line = ["sbatch", "--parsable", *(after(before) if before else [])]
    return output(line, text, wrong=UserError).partition(";")[0]


def after(job: str) -> list[str]:
    """The options with which a job begins when another one has succeeded, and goes when that has failed."""
    return [f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"]


def is_active(job: str) -> bool:
    """Whether a job, or any of an array, waits or runs."""
    try:
        return bool(output(["squeue", "--noheader", f"--jobs={job}", "--format=%T"]))
    except JobError as error:
        if "Invalid job id" in str(error):  # SLURM has forgotten it.
            return False
        raise


def status(job: str) -> str:
    """A line for each job of the number: its state, why it waits, where it runs, and how long already; or its end."""
    fields = "%i|%T|%r|%M|%l|%N"
    if not is_active(job):
        return _end(job)
    rows = output(["squeue", "--noheader", "--array", f"--jobs={job}", f"--format={fields}"]).splitlines()
    lines = []
    for row in rows:
        number, state, reason, ran, limit, nodes = row.split("|")
        where = f" on {nodes}" if nodes else ""
        why = f" ({reason})" if state == "PENDING" else ""
        lines.append(f"{number}: {state.lower()}{why}{where}, {ran} of {limit}")
    return "\n".join(lines)


def _end(job: str) -> str:
    """How the jobs of the number ended, which SLURM itself knows for some minutes (its MinJobAge)."""
    try:
        rows = output(["scontrol", "--oneliner", "show", "job", job]).splitlines()
    except JobError:
        return f"{job}: neither waits nor runs any more; see `crossguard launch logs`, and sacct where it is set up"
    lines = []
    for row in rows:
        known = dict(word.partition("=")[::2] for word in row.split())
        number = f"{known['ArrayJobId']}_{known['ArrayTaskId']}" if "ArrayTaskId" in known else known["JobId"]
        status = known["ExitCode"].partition(":")[0]
        lines.append(f"{number}: {known['JobState'].lower()}, exit status {status}; see `crossguard launch logs`")
    return "\n".join(lines)


def cancel(job: str) -> None:
    """End a job; what it has saved stays, and it is not requeued."""
    need("scancel", ELSEWHERE)
    output(["scancel", job])

"""Handing whole jobs to a scheduler, and asking after them: slurm and kubernetes."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossguard.configs.errors import UserError
from crossguard.configs.schema import LauncherConfig
from crossguard.launchers import deepspeed, kubernetes, one_node, procs_per_node, sbatch, torchrun
from crossguard.launchers.environment import environment_of
from crossguard.launchers.work import CROSSGUARD, Stage, Work

SCHEDULERS = ("slurm", "kubernetes")
LINES_OF_A_LOG = 100


@dataclass(frozen=True)
class Submission:
    """A job, or the jobs of a sweep.

    Attributes:
        works: the jobs.
        folder: where what is submitted, and what jobs print, is kept.
        build: the job whose shards all of a sweep read, to be built once before them.
    """

    works: list[Work]
    folder: Path
    build: Work | None = None


def rendered(submission: Submission, config: LauncherConfig) -> str:
    """Exactly what would run, to be pasted: a script, or a manifest. No secret is in it."""
    if config.name == "slurm":
        return _commands(submission, config)
    if config.name == "kubernetes":
        return kubernetes.manifest(submission.works, config)
    if config.name == "local":
        return "".join(f"{shlex.join([*CROSSGUARD, 'run', *work.arguments])}\n" for work in submission.works)
    stages = [stage for work in submission.works for stage in work.stages]
    if config.name == "deepspeed":
        lines = _with_environment_file(stages, submission, config)
    else:
        ranks = environment_of(config, procs_per_node(config))
        # As in `crossguard run`, one of torchrun's nodes does what needs no ranks.
        here = one_node.is_here(config)
        lines = [_line(stage, config, ranks) for stage in stages if stage.has_ranks or here]
        if config.nodes > 1:
            which = "that of the endpoint" if here else "any other than that of the endpoint, which builds and exports"
            lines.insert(0, f"# For this node, {which}; ask on the others as well.")
    return "\n".join(lines) + "\n"


def submit(submission: Submission, config: LauncherConfig) -> dict[str, Any]:
    """Hand the jobs to the scheduler; returns what `status`, `logs` and `cancel` need.

    Raises:
        UserError: a program is missing, or the scheduler refuses.
    """
    if config.name == "kubernetes":
        text = kubernetes.manifest(submission.works, config)
        _keep(submission.folder / "jobset.yaml", text)
        names = [work.name for work in submission.works]
        kubernetes.submit(names, text, config)
        return {"launcher": "kubernetes", "jobs": names, "namespace": config.kubernetes.namespace}
    jobs: list[str] = []
    for name, text in _scripts(submission, config):
        _keep(submission.folder / name, text)
        jobs.append(sbatch.submit(text, config, before=jobs[-1] if jobs else None))
    return {"launcher": "slurm", "jobs": jobs}


def is_active(record: dict[str, Any]) -> bool:
    """Whether what was submitted still waits or runs; in Kubernetes its name is taken."""
    return record["launcher"] == "slurm" and any(sbatch.is_active(job) for job in record["jobs"])


def status(record: dict[str, Any]) -> str:
    """What the scheduler says of the jobs."""
    if record["launcher"] == "kubernetes":
        return kubernetes.status(record["jobs"], record["namespace"])
    return "\n".join(sbatch.status(job) for job in record["jobs"])


def logs(record: dict[str, Any], folder: Path) -> str:
    """The last lines of what the jobs printed."""
    if record["launcher"] == "kubernetes":
        return kubernetes.logs(record["jobs"], record["namespace"])
    files = [file for job in record["jobs"] for file in sorted(folder.glob(f"slurm-{job}[._]*"))]
    if not files:
        raise UserError(f"{folder}: the job has printed nothing yet")
    parts = []
    for file in files:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        parts.append("\n".join([f"==> {file} <==", *lines[-LINES_OF_A_LOG:]]))
    return "\n".join(parts)


def cancel(record: dict[str, Any]) -> None:
    """End the jobs; what they have saved stays."""
    if record["launcher"] == "kubernetes":
        kubernetes.cancel(record["jobs"], record["namespace"])
    else:
        for job in record["jobs"]:
            sbatch.cancel(job)


def _scripts(submission: Submission, config: LauncherConfig) -> list[tuple[str, str]]:
    """File name and script of what is submitted, each to begin when the one before has succeeded."""
    folder = os.fspath(submission.folder)
    scripts = [("job.sh", sbatch.script(submission.works, config, output_folder=folder))]
    if submission.build:
        build = sbatch.script([submission.build], config, output_folder=folder, command="build")
        scripts.insert(0, ("build.sh", build))
    return scripts


def _commands(submission: Submission, config: LauncherConfig) -> str:
    """What submits the scripts, one after the other, in a shell."""
    lines, before = [f"mkdir -p {shlex.quote(os.fspath(submission.folder))}"], None
    for _, text in _scripts(submission, config):
        options = " ".join(["", *sbatch.after(before)]) if before else ""
        lines.append(f"job=$(sbatch --parsable{options} <<'SCRIPT'\n{text}SCRIPT\n)")
        before = "$job"
    return "\n".join([*lines, 'echo "$job"', ""])


def _with_environment_file(stages: list[Stage], submission: Submission, config: LauncherConfig) -> list[str]:
    """The command lines of the stages, with what deepspeed's ranks get through a file."""
    num_procs = procs_per_node(config)
    file = submission.folder.parent / ".environment-printed.json"
    own = environment_of(config, num_procs)
    patterns = [*config.deepspeed.export, *own]
    write = _with([sys.executable, "-m", "crossguard.launchers.environment", os.fspath(file), *patterns], own)
    lines = [_line(stage, config, {}, f"environment={file}") for stage in stages]
    return [
        "# The ranks get these variables through a file that only you may read.",
        write,
        *lines,
        shlex.join(["rm", os.fspath(file)]),
    ]


def _line(stage: Stage, config: LauncherConfig, variables: Mapping[str, str], *more: str) -> str:
    """The command line of a stage; variables and further arguments are those of ranks."""
    if not stage.has_ranks:
        return shlex.join([*CROSSGUARD, stage.command, *stage.arguments])
    command = {"torchrun": torchrun.command, "deepspeed": deepspeed.command}[config.name]
    return _with(
        command([f"stage={stage.command}", *stage.arguments, *more], procs_per_node(config), config), variables
    )


def _with(command: list[str], variables: Mapping[str, str]) -> str:
    """A command with environment variables, for a shell."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(command)])


def _keep(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")

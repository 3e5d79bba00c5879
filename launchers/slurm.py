"""Ranks in a SLURM allocation: one `srun` starts them on all nodes, each a task.

srun passes a request to stop on to all of them. Its own status is the highest of theirs, which need not be the first.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from crossguard.configs.errors import UserError
from crossguard.configs.schema import LauncherConfig
from crossguard.launchers.environment import environment_of
from crossguard.launchers.launcher_output import LauncherOutput
from crossguard.launchers.supervised import Child, restarting, run

# Ports below those that the kernel gives to clients: what is free now will be free when rank 0 has started.
PORTS = range(15000, 32000)
# Where one rank has ended the others end by themselves, the first one after it has handed its figures over. Ranks that
# wait for a lost one on GPUs would not: SLURM ends them.
SECONDS_AFTER_THE_FIRST = 180
# Lines of SLURM itself, and those where ranks have ended.
OWN = r"(srun|slurmstepd\S*): "
ENDED = r"srun: error: \S+: tasks? \S+: (?:Exited with exit code )?(\d+|[A-Z][^()]*\w)"


def launch(arguments: list[str], num_procs: int, config: LauncherConfig, run_dir: Path) -> None:
    """Run `python -m crossguard.train ARGUMENTS` on the ranks of all nodes of this allocation and wait for the end.

    Raises:
        UserError: srun is missing, or the allocation has other nodes; a rank ended with exit status 2.
        Preempted, JobError: see `supervised.run`.
    """
    if shutil.which("srun") is None:
        raise UserError("srun: not found, although SLURM_JOB_ID is set; is SLURM's bin folder in PATH?")
    allocated = int(os.environ.get("SLURM_JOB_NUM_NODES", config.nodes))
    if allocated != config.nodes:
        raise UserError(
            f"launcher.nodes={config.nodes}: this allocation has {allocated}; say launcher.nodes={allocated}"
        )

    def start(arguments: list[str], _: int) -> str:
        with LauncherOutput(run_dir / "logs" / "srun.log", OWN, ENDED, config.grace_seconds) as output:
            variables = _variables(num_procs, config)
            srun = Child(
                command(arguments, variables, config, run_dir),
                ask=_ask,
                ask_again=True,  # Ranks that are not there yet do not hear it.
                at_death=signal.SIGTERM,
                environment=os.environ | variables,
                output=output,
            )
            return run(srun, config.grace_seconds)

    restarting(start, arguments, config)


def command(arguments: list[str], variables: Mapping[str, str], config: LauncherConfig, run_dir: Path) -> list[str]:
    """The command line of srun, to be started with `variables`; its tasks take their numbers for ranks."""
    slurm = config.slurm
    options = [f"--nodes={config.nodes}", f"--ntasks-per-node={variables['LOCAL_WORLD_SIZE']}"]
    options += ["--kill-on-bad-exit=0", f"--wait={SECONDS_AFTER_THE_FIRST}"]
    if slurm.cpus_per_task:
        options.append(f"--cpus-per-task={slurm.cpus_per_task}")
    python = sys.executable
    if slurm.container:
        options += _container(variables, config, run_dir)
        python = "python3"  # The image's own: that of the node need not be there.
    ranks = 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$@"'
    return ["srun", *options, "bash", "-c", ranks, "rank", python, "-m", "crossguard.train", *arguments]


def _container(variables: Mapping[str, str], config: LauncherConfig, run_dir: Path) -> list[str]:
    """Options of pyxis (https://github.com/NVIDIA/pyxis): what the ranks write must not be gone with the container."""
    slurm, here = config.slurm, Path.cwd()
    folders = dict.fromkeys([here, *([] if run_dir.absolute().is_relative_to(here) else [run_dir.absolute()])])
    mounts = [*(f"{folder}:{folder}" for folder in folders), *slurm.container_mounts]
    return [
        f"--container-image={slurm.container}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={here}",
        # Else the image's own values would win.
        f"--container-env={','.join(variables)}",
    ]


def _variables(num_procs: int, config: LauncherConfig) -> dict[str, str]:
    """What the ranks get, beside the environment of the job: srun is started on the node of rank 0."""
    variables = environment_of(config, num_procs)
    if not config.threads_per_proc and "OMP_NUM_THREADS" not in config.environment:
        # SLURM may have given the job some of the node's cores alone.
        cores = config.slurm.cpus_per_task or int(os.environ.get("SLURM_CPUS_ON_NODE", num_procs)) // num_procs
        variables["OMP_NUM_THREADS"] = str(max(1, cores))
    place = {"MASTER_ADDR": socket.gethostname(), "MASTER_PORT": str(free_port())}
    return variables | place | {"LOCAL_WORLD_SIZE": str(num_procs)}


def free_port() -> int:
    """A port that no program of this machine listens on."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
            return port
    raise UserError(f"no free port between {PORTS.start} and {PORTS.stop}")


def _ask(srun: subprocess.Popen[str]) -> None:
    """srun hands this signal to all ranks; SIGTERM it would take as a wish to end them at once."""
    srun.send_signal(signal.SIGUSR1)

"""Where a job runs: command lines and environments, nothing of models or data.

Some launchers start the ranks of a stage and wait for them (`launch`): local, torchrun, deepspeed, and slurm inside an
allocation. Two submit a whole job to a scheduler, which runs its stages (`crossguard.launchers.submitting`): slurm and
kubernetes, whose nodes start their ranks through torchrun.
"""

from __future__ import annotations

import os
from pathlib import Path

from crossguard.configs.errors import UserError
from crossguard.configs.schema import LauncherConfig


def world_sizes(config: LauncherConfig) -> list[int]:
    """Every number of ranks that may train, the largest first."""
    from crossguard.launchers import deepspeed

    if config.name == "deepspeed" and (hosts := deepspeed.hosts_of(config)):
        return [sum(map(len, hosts.values()))]
    fewest = (config.torchrun.min_nodes if config.name == "torchrun" else None) or config.nodes
    return [nodes * procs_per_node(config) for nodes in range(config.nodes, fewest - 1, -1)]


def procs_per_node(config: LauncherConfig) -> int:
    """Ranks on each node."""
    from crossguard.launchers import local

    if config.name in ("slurm", "kubernetes"):  # The nodes are not this machine.
        return config.num_procs or max(config.gpus_per_node or 0, 1)
    return config.num_procs or max(local.count_gpus(), 1)


def launch(arguments: list[str], config: LauncherConfig, shared_out: int, run_dir: Path) -> None:
    """Run `python -m crossguard.train ARGUMENTS` on the ranks that `config` describes, and wait for the end.

    Args:
        arguments: of the ranks; the first is `stage=…`.
        config: the launcher's.
        shared_out: what any number of ranks must divide; 0 where any number will do.
        run_dir: where logs go.
    """
    from crossguard.launchers import deepspeed, local, slurm, torchrun

    num_procs = procs_per_node(config)
    if config.name == "local":
        local.launch(arguments, num_procs, config, shared_out)
    elif config.name == "torchrun":
        torchrun.launch(arguments, num_procs, config, run_dir)
    elif config.name == "deepspeed":
        deepspeed.launch(arguments, num_procs, config, run_dir)
    elif config.name == "slurm" and "SLURM_JOB_ID" in os.environ:
        slurm.launch(arguments, num_procs, config, run_dir)
    else:
        raise UserError(
            f"launcher={config.name}: is submitted as a whole; use `crossguard launch` with these arguments"
        )

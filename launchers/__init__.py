"""Where a job runs: command lines and environments, nothing of models or data."""

from __future__ import annotations

from crossguard.configs.schema import LauncherConfig


def num_procs(config: LauncherConfig) -> int:
    """How many ranks `launch` would start."""
    from crossguard.launchers import local

    return config.num_procs or max(local.count_gpus(), 1)


def launch(arguments: list[str], config: LauncherConfig, shared_out: int) -> None:
    """Run `python -m crossguard.train ARGUMENTS` on the ranks that `config` describes, and wait for the end.

    `shared_out` is what any number of ranks must divide.
    """
    from crossguard.launchers import local

    local.launch(arguments, num_procs(config), config, shared_out)

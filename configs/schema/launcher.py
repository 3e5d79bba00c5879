"""Where the ranks run."""

from __future__ import annotations

from dataclasses import dataclass

from crossguard.configs.schema.checks import at_least, one_of

LAUNCHERS = ("local",)


@dataclass
class LauncherConfig:
    """How many ranks, on what."""

    # The launcher that starts the ranks.
    name: str = "local"
    # Ranks on this machine; by default one for each GPU, or one.
    num_procs: int | None = None
    # Threads of each rank; by default the machine's cores shared out between the ranks.
    threads_per_proc: int | None = None

    def __post_init__(self) -> None:
        one_of("launcher.name", self.name, LAUNCHERS)
        at_least("launcher.num_procs", self.num_procs, 1)
        at_least("launcher.threads_per_proc", self.threads_per_proc, 1)

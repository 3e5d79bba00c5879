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
    # Seconds that the ranks have to save and end after SIGTERM or SIGUSR1, before they are killed.
    grace_seconds: float = 120.0
    # How often the ranks are started again, from the newest checkpoint, after one was killed by a signal or hung.
    max_restarts: int = 0
    # From the second restart on, use fewer ranks each time: the next smaller number that divides train.batch_size.
    elastic: bool = False

    def __post_init__(self) -> None:
        one_of("launcher.name", self.name, LAUNCHERS)
        at_least("launcher.num_procs", self.num_procs, 1)
        at_least("launcher.threads_per_proc", self.threads_per_proc, 1)
        at_least("launcher.grace_seconds", self.grace_seconds, 0)
        at_least("launcher.max_restarts", self.max_restarts, 0)

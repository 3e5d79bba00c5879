"""What a scheduler, or `--dry-run`, is told of a job: its stages as command lines of `crossguard`."""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass

# Leaves room for what Kubernetes puts behind it, in host names of at most 63 characters.
LONGEST_NAME = 36
CROSSGUARD = (sys.executable, "-m", "crossguard.recipes.cli")


@dataclass(frozen=True)
class Stage:
    """One stage of a job."""

    # Unique in the job: build, train, train-NAME for an ablation, evaluate, export.
    name: str
    # Whether ranks do it.
    has_ranks: bool
    # Of `crossguard COMMAND`: recipe=… key=value …
    arguments: list[str]

    @property
    def command(self) -> str:
        """As on the command line."""
        return self.name.partition("-")[0]


@dataclass(frozen=True)
class Work:
    """One job."""

    run_dir: str
    # Of `crossguard run`, which does all stages.
    arguments: list[str]
    stages: list[Stage]

    @property
    def name(self) -> str:
        """What schedulers call it: from the run directory, lower case, fit for a host name."""
        words = re.sub(r"[^a-z0-9]+", "-", self.run_dir.lower().removeprefix("runs/")).strip("-")
        name = f"crossguard-{words}"
        if len(name) <= LONGEST_NAME:
            return name
        digest = hashlib.blake2b(self.run_dir.encode(), digest_size=3).hexdigest()
        return f"{name[: LONGEST_NAME - 7].strip('-')}-{digest}"

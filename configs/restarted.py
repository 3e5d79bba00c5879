"""How ranks learn that their launcher has started them again within one job."""

from __future__ import annotations

import os

# The environment variable that torchrun's agent and a scheduler's script set.
RESTARTED = "CROSSGUARD_RESTARTED"


def without_fresh_start(arguments: list[str]) -> list[str]:
    """The arguments; on a later start of the same job without the wish to begin anew, which the first one fulfilled."""
    return [*arguments, "train.restart=false"] if os.environ.get(RESTARTED) else arguments

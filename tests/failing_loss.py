"""A loss of the user's own that hangs once on rank 1, for test_restarts.py."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

# The last pass of a step: the other rank waits at the same time, and sees its own time limit at about the same time.
CALLS = 21
calls = 0


def hang_for_good() -> None:
    """The name that a stack in the log must show."""
    while True:
        time.sleep(1)


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy."""
    global calls
    calls += 1
    hung = Path(os.environ["HUNG_BEFORE"])
    if os.environ["RANK"] == "1" and calls > CALLS and not hung.exists():
        hung.touch()
        hang_for_good()
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.nan_to_num(0), reduction="none")

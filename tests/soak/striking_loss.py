"""A loss of the user's own, for stops.py: its rank gets a signal in the phase of training that STRIKE names."""

from __future__ import annotations

import json
import os
import signal
import threading
from contextlib import ExitStack

import torch

from crossguard.train import phases

# To the end of the process.
ARMED = ExitStack()


def arm(phase: str, times: int, rank: int, delay: float) -> None:
    """SIGTERM, `delay` seconds after the rank has entered the phase for so many times."""
    left = times

    def strike(name: str) -> None:
        nonlocal left
        left -= name == phase
        if name == phase and left == 0:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM)).start()

    if rank == int(os.environ["RANK"]):
        ARMED.enter_context(phases.listening(strike))


if "STRIKE" in os.environ:
    arm(**json.loads(os.environ["STRIKE"]))


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy."""
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.nan_to_num(0), reduction="none")

"""A loss that waits in the first step until the rank is asked to stop, as often as a folder says.

`WAIT_IN` names the folder: `times` in it holds how often; each time rank 0 leaves a file `waiting-N` there.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import nn

from crossguard.train import preemption

IN_CALL = 2
SECONDS = 120.0


class _Calls:
    count = 0


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of each element."""
    _Calls.count += 1
    if file := os.environ.get("WANDB_SHOW"):  # What a launcher should have handed over.
        Path(file).write_text(f"KEY={os.environ.get('WANDB_API_KEY')}")
    if _Calls.count == IN_CALL and "WAIT_IN" in os.environ and os.environ["RANK"] == "0":
        _wait(Path(os.environ["WAIT_IN"]))
    return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def _wait(folder: Path) -> None:
    before = len(list(folder.glob("waiting-*")))
    if before >= int((folder / "times").read_text()):
        return
    (folder / f"waiting-{before}").touch()
    deadline = time.monotonic() + SECONDS
    while not preemption.asked():
        if time.monotonic() > deadline:
            raise TimeoutError("nobody asked")
        time.sleep(0.05)


def wait_in(folder: Path, times: int) -> str:
    """Make the folder; returns the setting that names it to the ranks."""
    folder.mkdir(parents=True)
    (folder / "times").write_text(str(times))
    return f"launcher.environment.WAIT_IN={folder}"

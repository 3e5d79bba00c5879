"""Samples a second on texts as long as real posts are, against the Trainer of transformers: what padding costs."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import lengths_contender
from contender import Process
from table import Line, show

OURS, DEFAULT, GROUPED = "crossguard", "HF Trainer", "HF Trainer, group_by_length"
# An epoch.
ROUNDS = 4


def measure(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Blocks of all contenders in turns, so that what disturbs the machine disturbs all of them."""
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in (OURS, DEFAULT, GROUPED)}
    with ExitStack() as stack:
        contenders = {}
        for name in measured:
            contenders[name] = Process(folder, name, lengths_contender.__file__)
            stack.callback(contenders[name].end)
        for _ in range(ROUNDS):
            for name, contender in contenders.items():
                measured[name].append(contender.round())
    return measured


def main() -> bool:
    """Measure and compare; whether the target is reached."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lengths_contender.prepare(folder)
        measured = measure(folder)

    # Blocks differ in length; all of them together are an epoch.
    def total(name: str, what: str) -> float:
        return sum(block[what] for block in measured[name])

    speed = {name: total(name, "samples") / total(name, "seconds") for name in measured}
    cpu = {name: total(name, "cpu") / total(name, "samples") * 1e3 for name in measured}
    return show(
        "Training on texts as long as real posts, batches of 32, fp32",
        [
            Line("samples/s against HF Trainer, padded as by default", speed[OURS], speed[DEFAULT], 1.6, more=True),
            Line("samples/s against HF Trainer with group_by_length", speed[OURS], speed[GROUPED], None, more=True),
            Line("CPU time a sample against HF Trainer", cpu[OURS], cpu[DEFAULT], None, "ms"),
            Line("CPU time a sample against HF Trainer with group_by_length", cpu[OURS], cpu[GROUPED], None, "ms"),
        ],
    )


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("WANDB_MODE", "offline")
    sys.exit(not main())

"""CPU time of a training step beside that of the model: our loop against raw DeepSpeed, a bare loop and others' loops.

The model is near zero, so that what is measured is the loop. All run in turns in one process with the simpler loops that
they are compared with, and differences are those of neighbouring blocks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from table import Line, show

RANKS, STAGES = (1, 2), (0, 1, 2, 3)
PEERS = ("HF Trainer", "HF Trainer + DeepSpeed", "Lightning Fabric")
# Milliseconds more than raw DeepSpeed, in every stage, and than a bare loop, without ZeRO.
OVER_DEEPSPEED, OVER_BARE = 1.0, 3.5
# Loop -> CPU milliseconds a step, block by block.
Blocks = dict[str, list[float]]


def measure(loop: str, ranks: int, stages: Iterable[int]) -> dict[str, list[Blocks]]:
    """Stage -> the blocks of every rank."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += [str(Path(__file__).with_name("step_rank.py")), str(output), loop, *map(str, stages)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        found: dict[str, list[Blocks]] = json.loads(output.read_text())
        return found


def beside(found: list[Blocks], ours: str, peer: str) -> tuple[float, float]:
    """Milliseconds of a loop and of one that ran in turns with it, of the rank where they differ most."""
    differences = [median(a - b for a, b in zip(blocks[ours], blocks[peer], strict=True)) for blocks in found]
    worst = max(range(len(found)), key=lambda rank: differences[rank])
    middle = median(found[worst][peer])
    return middle + differences[worst], middle


def main() -> bool:
    """Measure and compare; whether all targets are reached."""
    lines = []
    taxes = {}
    for ranks in RANKS:
        found = measure("crossguard", ranks, STAGES)
        for stage in STAGES:
            ours, raw = beside(found[str(stage)], "crossguard", "deepspeed")
            title = f"over raw deepspeed.initialize, ZeRO-{stage}, {ranks} rank{'s' * (ranks > 1)}"
            lines.append(Line(title, ours, raw, OVER_DEEPSPEED, "ms", difference=True))
        if ranks == 1:
            ours, bare = beside(found["0"], "crossguard", "bare")
            lines.append(Line("over a bare loop, ZeRO-0, 1 rank", ours, bare, OVER_BARE, "ms", difference=True))
            taxes["crossguard"] = ours - bare
    for name in PEERS:
        with_loop, bare = beside(measure(name, 1, (0,))["0"], name, "bare")
        taxes[name] = with_loop - bare
        lines.append(Line(f"what is over a bare loop, beside {name}'s", taxes["crossguard"], taxes[name], None, "ms"))
    return show("CPU time of a step beside that of the model, logs and W&B included", lines)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("WANDB_MODE", "offline")
    sys.exit(not main())

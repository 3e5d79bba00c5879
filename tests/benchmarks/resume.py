"""How long a resumed run waits for its next batch, against the first batch of a cold start; each in a new process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from posts import BATCH, POSTS, default_folder, prepare
from table import Line, show

ROUNDS = 7
# In epochs: within the first one, and after so many that skipping would show.
POSITIONS = (0.7, 1000.7)


def seconds_to_first_batch(first_step: int) -> float:
    """From the start of planning, with everything imported; measured in a process of its own."""
    command = [sys.executable, __file__, str(first_step)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def measure(folder: Path, first_step: int) -> float:
    """Seconds to the first batch, in this process."""
    from peers import our_loader

    start = time.perf_counter()
    batches = iter(our_loader(folder, first_step))
    next(batches)
    seconds = time.perf_counter() - start
    batches.close()
    return seconds


def main() -> bool:
    """Measure and compare; whether all targets are reached."""
    prepare(default_folder())
    steps = [1, *(1 + int(position * POSTS / BATCH) for position in POSITIONS)]
    rounds = [[seconds_to_first_batch(step) for step in steps] for _ in range(ROUNDS)]
    cold, *resumed = (median(times) for times in zip(*rounds, strict=True))
    return show(
        "Resuming",
        [
            Line(f"next batch at {position:g} epochs against a cold start", seconds, cold, 1.2, "s")
            for position, seconds in zip(POSITIONS, resumed, strict=True)
        ],
    )


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    if len(sys.argv) > 1:
        print(measure(default_folder(), int(sys.argv[1])))
    else:
        sys.exit(not main())

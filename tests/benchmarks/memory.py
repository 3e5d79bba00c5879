"""The memory of the loader: proportional set size of the process that trains, its workers and all that they started."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import psutil
from contender import Process
from posts import default_folder, prepare
from table import Line, show

LIMIT_MB = 330.0
OTHERS = (
    "raw files, our decoder",
    "mosaicml-streaming, our decoder",
    "webdataset, our decoder",
    "litdata, our decoder",
)
SECONDS_BETWEEN_LOOKS = 0.05
ROUNDS = 3


def peak(folder: Path, name: str) -> float:
    """MB. Other processes that use torch at the same time share its libraries, and lower it."""
    contender = Process(folder, name)
    most, done = 0.0, threading.Event()

    def look() -> None:
        nonlocal most
        while not done.wait(SECONDS_BETWEEN_LOOKS):
            try:
                most = max(most, sum(process.memory_full_info().pss for process in contender.tree()) / 2**20)
            except psutil.Error:  # one has just ended
                continue

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(ROUNDS):
            contender.round()
    finally:
        done.set()
        looking.join()
        contender.end()
    return most


def main() -> bool:
    """Measure and compare; whether the target is reached."""
    folder = default_folder()
    prepare(folder)
    ours = peak(folder, "crossguard")
    lines = [Line("peak PSS with 2 workers, against the limit", ours, LIMIT_MB, 1.0, "MB")]
    lines += [Line(f"peak PSS against {name}", ours, peak(folder, name), None, "MB") for name in OTHERS]
    return show("Memory", lines)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(not main())

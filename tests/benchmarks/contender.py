"""One loader in a process of its own: `python contender.py FOLDER NAME`.

Runs a round for each line on its standard input and answers with a line of JSON: the samples delivered, the seconds
that took, and the CPU time of all its processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from posts import BATCH, POSTS

ROUND = POSTS // BATCH
# Batches that workers may have prepared while nobody asked for any.
PREPARED = 8


class Process:
    """A contender, started and driven from another process."""

    def __init__(self, folder: Path, name: str, script: str = __file__):
        command = [sys.executable, script, str(folder), name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def round(self) -> dict[str, float]:
        """Run one round."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("round\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, float] = json.loads(line)
                return answer
        raise RuntimeError(f"{self.process.args}: ended with status {self.process.wait()}")

    def tree(self) -> list[psutil.Process]:
        """It and all that it has started."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def end(self) -> None:
        """End all of its processes."""
        for process in self.tree():
            process.kill()
        self.process.wait()


def cpu_seconds() -> float:
    """CPU time so far of this process, those it has started, and those that have ended."""
    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        times = process.cpu_times()
        total += times.user + times.system + times.children_user + times.children_system
    return total


def size(batch: Any) -> int:
    """Samples in a batch."""
    return len(batch["id"]) if isinstance(batch, dict) else len(batch)


def drive(folder: Path, name: str) -> Iterator[dict[str, float]]:
    """The measurements of one round after the other."""
    # Not above: processes that a loader starts may import this file anew.
    from peers import CONTENDERS

    contender = CONTENDERS[name]
    passes = contender.passes(folder)
    stream = next(passes) if contender.endless else None
    while True:
        if stream is not None:  # What was prepared between the rounds would come for free.
            deque(islice(stream, PREPARED), maxlen=0)
        cpu, start = cpu_seconds(), time.perf_counter()
        batches = next(passes) if stream is None else islice(stream, ROUND)
        samples = sum(map(size, batches))
        yield {"samples": samples, "seconds": time.perf_counter() - start, "cpu": cpu_seconds() - cpu}


def main() -> None:
    """Answer until standard input is closed."""
    measurements = drive(Path(sys.argv[1]), sys.argv[2])
    for _ in sys.stdin:
        print(json.dumps(next(measurements)), flush=True)


if __name__ == "__main__":
    main()

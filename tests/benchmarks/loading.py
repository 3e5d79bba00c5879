"""CPU time and samples per second of the whole loader, from JPEGs of 448² in shards to batches of 224² and tokens."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from contender import Process
from posts import default_folder, prepare
from table import Line, show

ROUNDS = 9
OURS = "crossguard"
DOCUMENTED = ("webdataset", "mosaicml-streaming", "litdata", "raw files")
SHARD_FORMATS = tuple(f"{name}, our decoder" for name in ("webdataset", "mosaicml-streaming", "litdata"))
RAW_FILES = "raw files, our decoder"
LIMIT = "bare loop"
# With Pillow a round takes three times as long, and the ratios are far from their limit.
DOCUMENTED_ROUNDS = 3


def measure(folder: Path, rounds: int = ROUNDS) -> dict[str, list[dict[str, float]]]:
    """Rounds of all contenders, in turns, so that what disturbs the machine disturbs all of them."""
    measured = defaultdict(list)
    with ExitStack() as stack:
        contenders = {}
        for name in (OURS, *SHARD_FORMATS, RAW_FILES, LIMIT, *DOCUMENTED):
            contenders[name] = Process(folder, name)
            stack.callback(contenders[name].end)
            contenders[name].round()  # Imports, workers and caches warm up.
        for number in range(rounds):
            for name, contender in contenders.items():
                if name not in DOCUMENTED or number < DOCUMENTED_ROUNDS:
                    measured[name].append(contender.round())
    return measured


def compare(measured: dict[str, list[dict[str, float]]]) -> bool:
    """Print the table; whether all targets are reached."""
    cpu = {name: median(r["cpu"] / r["samples"] for r in rounds) * 1e3 for name, rounds in measured.items()}
    targets = [(DOCUMENTED, 0.4), (SHARD_FORMATS, 0.85), ((RAW_FILES,), 1.05), ((LIMIT,), 1.15)]
    lines = [
        Line(f"CPU time a sample against {name}", cpu[OURS], cpu[name], target, "ms")
        for names, target in targets
        for name in names
    ]
    # Wall time depends on who else runs, so rounds are compared that ran one after the other.
    speed, peer = ([r["samples"] / r["seconds"] for r in measured[name]] for name in (OURS, SHARD_FORMATS[0]))
    ratio = median(one / other for one, other in zip(speed, peer, strict=True))
    lines.append(Line(f"samples/s against {SHARD_FORMATS[0]}", median(speed), median(speed) / ratio, 1.2, more=True))
    return show("Loading with 2 workers", lines)


def main() -> bool:
    """Measure and compare; whether all targets are reached."""
    folder = default_folder()
    prepare(folder)
    return compare(measure(folder))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(not main())

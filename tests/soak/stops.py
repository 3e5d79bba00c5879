"""Requests to stop at random moments of every phase of training, of its evaluations and saves, and of the evaluate stage.

All ranks must stop after one step with the state saved, and the run that goes on must equal, bit for bit, the one that
was never stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path

from rank_models import run_ranks
from rank_training import write_shards

# The signal comes up to so many seconds after its phase has begun: it may hit the next one as well.
SPREAD = 0.05


def main() -> None:
    """Prints how many requests met a run in each phase, and how many of those did as they should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder to work in; it must not exist")
    parser.add_argument("--times", type=int, default=10)
    asked = parser.parse_args()
    folder: Path = asked.folder.resolve()
    write_shards(folder)
    ranks = Path(__file__).parent.parent / "rank_preemption.py"
    printed = run_ranks(2, ranks, str(folder), str(asked.times), str(SPREAD), timeout=7200)
    found = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    good, late = Counter[str](), Counter[str]()
    for case in found:
        if case["stopped"] in ([None, None], [False, False]):
            late[case["phase"]] += 1
        good[case["phase"]] += case["equal"] and case.get("ended", True) and len(set(case["stopped"])) == 1
    for phase, count in Counter(case["phase"] for case in found).items():
        print(f"{phase}: {good[phase]} of {count} well, {late[phase]} of them came after the end", flush=True)
    sys.exit(sum(good.values()) != len(found))


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":
        sys.exit("set OMP_NUM_THREADS=1: results depend on the number of threads")
    main()

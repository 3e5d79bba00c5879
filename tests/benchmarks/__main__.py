"""All benchmarks: `python tests/benchmarks`, or one of them: `python tests/benchmarks/loading.py`."""

from __future__ import annotations

import os
import sys

import loading
import memory
import plan
import resume

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    reached = [benchmark.main() for benchmark in (memory, resume, loading, plan)]
    sys.exit(not all(reached))

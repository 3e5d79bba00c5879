"""All benchmarks: `python tests/benchmarks`, or one of them: `python tests/benchmarks/loading.py`."""

from __future__ import annotations

import os
import sys

import checkpoint
import loading
import memory
import order
import plan
import pretrained
import resume

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    reached = [benchmark.main() for benchmark in (memory, order, resume, loading, checkpoint, plan, pretrained)]
    sys.exit(not all(reached))

"""All benchmarks: `python tests/benchmarks`, or one of them: `python tests/benchmarks/loading.py`."""

from __future__ import annotations

import os
import sys

import checkpoint
import fusions
import lengths
import loading
import memes
import memory
import multilingual
import order
import plan
import pretrained
import resume
import step

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("WANDB_MODE", "offline")
    models = (fusions, multilingual, memes)
    everything = (memory, order, resume, loading, checkpoint, plan, pretrained, step, lengths, *models)
    reached = [benchmark.main() for benchmark in everything]
    sys.exit(not all(reached))

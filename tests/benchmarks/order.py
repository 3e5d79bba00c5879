"""The sample order at 1 million shards and 10 billion samples of a simulated manifest: resume, memory, time a sample."""

from __future__ import annotations

import resource
import sys
import time
from multiprocessing import get_context
from statistics import median

import numpy as np
from table import Line, show

from crossguard.configs.schema.mixing import MixingConfig
from crossguard.data.loading.order import SampleOrder
from crossguard.data.loading.strata import Layout

SHARDS = 1_000_000
# Of each of four languages: two policies and benign posts; 10,000 samples a shard.
PER_SHARD = [4000, 800, 200, 1800, 350, 100, 1400, 250, 100, 800, 150, 50]
BATCH = 256
POSITION = 9_000_000_000
STEPS = 2000
# Seconds, megabytes and microseconds that may be needed.
RESUME, MEMORY, SAMPLE = 1.0, 512.0, 1.0


def measure(temperature: float) -> tuple[float, float, float]:
    """Seconds from the counts of a manifest to the first step of a resumed run, peak MB, CPU µs a sample after it."""
    counts = np.empty((SHARDS, len(PER_SHARD)), dtype=np.uint32)
    counts[:] = PER_SHARD
    # Not all shards are alike.
    shift = np.random.default_rng(0).integers(0, 40, SHARDS, dtype=np.uint32)
    counts[:, 0] += shift
    counts[:, 3] -= shift
    names = [f"l{number // 3}/{('benign', 'a', 'b')[number % 3]}" for number in range(len(PER_SHARD))]
    start = time.perf_counter()
    layout = Layout.of_counts(["own"], [names], [counts])
    order = SampleOrder(layout, BATCH, 0, MixingConfig(temperature=temperature))
    first = POSITION // BATCH + 1
    order.rows(first)
    resumed = time.perf_counter() - start
    cpu = time.process_time()
    for step in range(first, first + STEPS):
        order.rows(step)
    cpu = (time.process_time() - cpu) / (STEPS * BATCH)
    return resumed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000, cpu * 1e6


def main() -> bool:
    """Measure with and without mixing, each in processes of its own; whether all limits are kept."""
    lines = []
    for temperature, name in ((1.0, "as the posts are"), (3.0, "12 strata at temperature 3")):
        found = []
        for _ in range(3):
            with get_context("spawn").Pool(1) as process:
                found.append(process.apply(measure, (temperature,)))
        resumed, memory, sample = (median(values) for values in zip(*found, strict=True))
        lines += [
            Line(f"order, {name}: resume at 9 billion", resumed, RESUME, 1, "s"),
            Line(f"order, {name}: peak memory", memory, MEMORY, 1, "MB"),
            Line(f"order, {name}: CPU time a sample", sample, SAMPLE, 1, "µs"),
        ]
    return show(f"Sample order: {SHARDS:,} shards, {SHARDS * sum(PER_SHARD):,} samples (peer: the limit)", lines)


if __name__ == "__main__":
    sys.exit(not main())

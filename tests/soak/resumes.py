"""Resumes of the sample order at random positions, on random ranks, workers and micro-batches."""

from __future__ import annotations

import random
from pathlib import Path

from resumed_order import Resumes


def resumes(folder: Path, count: int, draw: random.Random) -> None:
    """`count` of them, through the training loader: the next 10,000 ids are those of a run that was never stopped."""
    tried = Resumes()
    compared = sum(tried.try_one(draw, draw.choice((0, 0, 1, 2, 3))) for _ in range(count))
    print(f"soak: {count} resumes, {compared} ids as in the uninterrupted order", flush=True)

"""Resumes through the training loader, of an order that mixes, plans by length and goes around rows: any position,
ranks, workers and micro-batches. Imported by the workers, which need no torch."""

from __future__ import annotations

import random
from contextlib import closing
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from orders import mixed_config, skewed_layout

from crossguard.data.loading.encoded import NO_POSITION, EncodedSample, Layout
from crossguard.data.loading.loader import TrainLoader
from crossguard.data.loading.order import SampleOrder
from crossguard.data.loading.reader import SampleError
from crossguard.data.loading.sample import RawSample

BATCH = 960  # Few steps hold many samples, and a step costs more than a sample.
STEPS = 120
# Together 10,000 samples or more.
AHEAD = -(-10_000 // BATCH)
RANKS = (1, 2, 3, 4, 6, 8, 12)
LABELS = np.zeros(1, dtype=np.float32)


class Rows:
    """In place of a reader: every sample says its row; those of `damaged` cannot be read."""

    split, place = "train", "nowhere"

    def __init__(self, damaged: np.ndarray):
        self.damaged = frozenset(damaged.tolist())

    def read(self, row: int) -> RawSample:
        if row in self.damaged:
            raise SampleError(row, str(row), "damaged")
        return RawSample({"id": str(row)})


class Names:
    """In place of an encoder: nothing but the name."""

    fingerprint = "names"
    layout: ClassVar[Layout] = {"pad_id": 0, "image_size": 1, "num_labels": 1, "frame_size": None, "silence": None}

    def __call__(self, raw: RawSample, position: int = NO_POSITION) -> EncodedSample:
        return EncodedSample(raw.id, "und", None, [], LABELS)

    def text_length(self, raw: RawSample) -> int:
        return 0


class Resumes:
    """One order, its uninterrupted delivery, and resumes of it."""

    def __init__(self) -> None:
        self.layout = skewed_layout(1, shards=(40, 10), strata=(20, 5), scale=40)
        numbers, rows = np.random.default_rng(0), self.layout.num_rows
        self.lengths = numbers.integers(1, 200, rows)
        # Refused before the run began, and damaged ones that it meets.
        self.refused, damaged = np.split(numbers.choice(rows, rows // 25, replace=False), 2)
        self.reader = Rows(damaged)

        found: list[dict[str, Any]] = []
        self.expected = self._deliver(self._order(), 1, STEPS, ranks=1, micro=BATCH, workers=0, found=found)
        self.found = np.array([[line["step"], line["row"]] for line in found])

    def try_one(self, draw: random.Random, workers: int) -> int:
        """Resume once, on some ranks that have `workers` each, and compare the next 10,000 ids or more; returns how
        many.

        The order goes around what a run up to there has found damaged, as a checkpoint would tell it to.
        """
        start, ranks = draw.randint(1, STEPS - AHEAD + 1), draw.choice(RANKS)
        order = self._order()
        order.refuse(np.unique(self.found[self.found[:, 0] < start, 1]))
        micro = draw.randint(1, 400)
        ids = self._deliver(order, start, start + AHEAD - 1, ranks=ranks, micro=micro, workers=workers, found=[])
        assert ids == self.expected[start - 1 : start - 1 + AHEAD], (start, ranks, workers, micro)
        return sum(map(len, ids))

    def _order(self) -> SampleOrder:
        mixing = mixed_config(3.0, change_after=50)
        return SampleOrder(self.layout, BATCH, 7, mixing, lengths=self.lengths, refused=self.refused)

    def _deliver(
        self, order: SampleOrder, first: int, last: int, *, ranks: int, micro: int, workers: int, found: list[Any]
    ) -> list[list[str]]:
        """The ids of each step, those of the ranks one after the other."""
        together: list[list[str]] = [[] for _ in range(first, last + 1)]
        for rank in range(ranks):
            loader = TrainLoader(
                self.reader,  # type: ignore[arg-type]
                order,
                Names(),
                rank=rank,
                world_size=ranks,
                micro_batch_size=micro,
                num_workers=workers,
                start_step=first,
                end_step=last,
                on_refused=found.append,
            )
            with closing(iter(loader)) as steps:  # type: ignore[type-var]
                for ids, batches in zip(together, islice(steps, len(loader)), strict=True):
                    ids += [name for batch in batches for name in batch.ids]
        return together

"""The rows that are not read any more, and since which step: a part of every checkpoint."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FILE_NAME = "refused.npy"


@dataclass(frozen=True)
class Refused:
    """Grows, and never shrinks: a row that was refused stays refused."""

    # int64[R], sorted, without duplicates.
    rows: np.ndarray
    # int64[R]: the first step that the row is not read in.
    since: np.ndarray

    @classmethod
    def none(cls) -> Refused:
        """Nothing is refused."""
        return cls(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))

    @classmethod
    def load(cls, folder: Path) -> Refused:
        """What `encode` made, from a checkpoint's folder."""
        table = np.load(folder / FILE_NAME, allow_pickle=False)
        return cls(table[:, 0], table[:, 1])

    def encode(self) -> bytes:
        """The bytes of the file."""
        buffer = io.BytesIO()
        np.save(buffer, np.stack([self.rows, self.since], axis=1), allow_pickle=False)
        return buffer.getvalue()

    def add(self, rows: np.ndarray, step: int) -> Refused:
        """More rows, not read from `step` on; those that were refused before keep their step."""
        new = np.setdiff1d(rows, self.rows)
        every = np.concatenate([self.rows, new])
        order = np.argsort(every)
        return Refused(every[order], np.concatenate([self.since, np.full(len(new), step)])[order])

    def in_step(self, step: int) -> np.ndarray:
        """int64[…]: the rows that are not read in `step`."""
        return self.rows[self.since <= step]

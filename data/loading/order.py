"""The sample order: which sample comes when, as pure arithmetic on (split, seed, position).

Position p counts samples delivered so far over all ranks. Epoch e holds positions [e·n, (e+1)·n) and every row of the
split exactly once; step s ≥ 1 covers positions [(s-1)·B, s·B). Nothing depends on ranks, workers or what was read
before, so any step is known without the steps before it, and a few hundred bytes are the whole state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from crossguard.configs.errors import UserError
from crossguard.data.loading.permutation import Permutation, derive_key

STATE_FORMAT = 1
# Batches planned together by length. On log-normal lengths (sigma .6 to 1) 128 leave 2 % padding, 32 leave 6 %.
WINDOW_BATCHES = 128
# What the parts of the state are called where the user sets them.
STATE_NAMES = {
    "format": "format of the state",
    "manifest": "shards (hash of the manifest)",
    "seed": "seed",
    "batch_size": "train.batch_size",
    "lengths": "token lengths (tokenizer or its max_length)",
    "refused": "refused samples",
}


def micro_batches(batch_size: int, world_size: int, micro_batch_size: int) -> tuple[int, int]:
    """Samples in one forward pass of a rank, and passes in a step.

    `micro_batch_size` is an upper bound: the largest divisor of batch_size / world_size not above it is taken.

    Raises:
        UserError: the ranks do not divide the batch.
    """
    if batch_size % world_size:
        raise UserError(
            f"train.batch_size={batch_size}: {world_size} ranks do not divide it; choose a multiple of {world_size}"
        )
    share = batch_size // world_size
    micro = next(size for size in range(min(micro_batch_size, share), 0, -1) if share % size == 0)
    return micro, share // micro


@dataclass(frozen=True)
class Redirects:
    """Where a position turns whose sample must not or cannot be read: always the same way, on every rank."""

    num_samples: int
    seed: int
    # int64[R], sorted, without duplicates: rows that are never read.
    refused: np.ndarray

    def is_refused(self, rows: np.ndarray) -> np.ndarray:
        """bool, of the shape of `rows`."""
        return np.isin(rows, self.refused)

    def rows(self, position: int) -> Iterator[int]:
        """Endless, possibly repeating rows of the split to try at `position`, one after the other."""
        attempt = 1
        while True:
            row = int(derive_key("redirect", self.seed, position, attempt)[0]) % self.num_samples
            if not self.is_refused(np.array(row)):
                yield row
            attempt += 1


class SampleOrder:
    """The order of one split.

    With `lengths`, the batches of a window are planned together: its rows are sorted by length and cut into batches,
    which are then shuffled, so that a batch holds texts of about one length. Inside a batch the rows stay sorted:
    contiguous slices for ranks and micro-batches then hold the least padding, and since a batch spans only 1/128 of
    the lengths, ranks still differ by no more than a few percent in tokens.

    Args:
        num_samples: rows of the split, n.
        batch_size: samples of a step over all ranks, B.
        seed: chooses the order.
        lengths: token length of each row, int[n]; None plans nothing.
        refused: rows that may not be read; their positions are redirected to other rows. They are replaced after the
            planning, so that a longer list moves no other position.

    Raises:
        UserError: no sample is left.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        lengths: np.ndarray | None = None,
        refused: np.ndarray | None = None,
    ):
        if lengths is not None and len(lengths) != num_samples:
            raise ValueError(f"{len(lengths)} lengths for {num_samples} samples")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.lengths = lengths
        banned = np.unique(np.asarray([] if refused is None else refused, dtype=np.int64))
        if len(banned) >= num_samples:
            raise UserError(f"none of the split's {num_samples} samples may be read (expired or refused)")
        self.redirects = Redirects(num_samples, seed, banned)
        self.window_batches = max(1, min(WINDOW_BATCHES, num_samples // batch_size))
        self._window: tuple[int, np.ndarray] | None = None
        self._shuffle: tuple[int, Permutation] | None = None

    def positions(self, step: int) -> np.ndarray:
        """int64[B]: the positions of `step` ≥ 1."""
        return np.arange((step - 1) * self.batch_size, step * self.batch_size, dtype=np.int64)

    def rows(self, step: int) -> np.ndarray:
        """int64[B]: the rows of `step` ≥ 1, in the order of their positions."""
        if step < 1:
            raise ValueError(f"steps begin at 1, got {step}")
        rows = self._planned(step).copy()
        for place in np.flatnonzero(self.redirects.is_refused(rows)):
            rows[place] = next(self.redirects.rows((step - 1) * self.batch_size + int(place)))
        return rows

    def epoch(self, step: int) -> float:
        """Passes over the split that are done after `step`."""
        return step * self.batch_size / self.num_samples

    def state(self, manifest_hash: str, position: int) -> dict[str, Any]:
        """All that a resumed run needs to go on at `position`; JSON, under 1 KB."""
        return self._identity(manifest_hash) | {"position": position}

    def check_state(self, saved: Mapping[str, Any], manifest_hash: str) -> None:
        """Make sure that this order continues the saved one.

        More refused samples than before are no difference: posts expire while a job is interrupted, and what expired
        must not be read. It moves no other position.

        Raises:
            UserError: names everything that changed.
        """
        mine = self._identity(manifest_hash)
        changed = [name for name in mine if saved.get(name) != mine[name]]
        if "refused" in changed and len(self.redirects.refused) > saved.get("refused", {}).get("count", 0):
            changed.remove("refused")
        if changed:
            details = "; ".join(f"{STATE_NAMES[name]}: {saved.get(name)} before, {mine[name]} now" for name in changed)
            raise UserError(
                f"the sample order is not that of the checkpoint: {details}; "
                "restore it, or begin anew with train.restart=true"
            )

    def fingerprint(self) -> str:
        """Hash of everything that decides the order, beside the shards."""
        return _hash(repr(sorted(self._identity("").items())).encode())

    def _identity(self, manifest_hash: str) -> dict[str, Any]:
        refused = self.redirects.refused
        return {
            "format": STATE_FORMAT,
            "manifest": manifest_hash,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "lengths": self._lengths_hash,
            "refused": {"count": len(refused), "hash": _hash(refused.astype("<i8").data)},
        }

    @cached_property
    def _lengths_hash(self) -> str | None:
        return None if self.lengths is None else _hash(np.ascontiguousarray(self.lengths, dtype="<u4").data)

    def _planned(self, step: int) -> np.ndarray:
        """The rows of a step before refused ones are replaced."""
        size = self.batch_size
        if self.lengths is None:
            return self._shuffled((step - 1) * size, step * size)
        window, batch = divmod(step - 1, self.window_batches)
        if self._window is None or self._window[0] != window:
            self._window = window, self._plan_window(window)
        return self._window[1][batch * size : (batch + 1) * size]

    def _plan_window(self, window: int) -> np.ndarray:
        """int64[window_batches · B]: planned one epoch at a time, so that no row leaves the positions of its epoch."""
        start, end = (number * self.window_batches * self.batch_size for number in (window, window + 1))
        pieces = []
        while start < end:
            stop = min(end, (start // self.num_samples + 1) * self.num_samples)
            pieces.append(self._plan_piece(start, stop))
            start = stop
        return np.concatenate(pieces)

    def _plan_piece(self, start: int, stop: int) -> np.ndarray:
        """Sort positions [start, stop) of one epoch by length, cut them into batches, and shuffle the batches.

        A batch that two epochs share takes the shortest texts of both.
        """
        assert self.lengths is not None
        rows = self._shuffled(start, stop)
        rows = rows[np.argsort(self.lengths[rows], kind="stable")]
        head = min(-start % self.batch_size, stop - start)
        tail = (stop - start - head) % self.batch_size
        batches = rows[head + tail :].reshape(-1, self.batch_size)
        shuffle = Permutation(len(batches), derive_key("batches", self.seed, start))
        shuffled = batches[shuffle(np.arange(len(batches)))]
        return np.concatenate([rows[:head], shuffled.ravel(), rows[head : head + tail]])

    def _shuffled(self, start: int, stop: int) -> np.ndarray:
        """The rows at positions [start, stop) before planning."""
        pieces = []
        for epoch in range(start // self.num_samples, (stop - 1) // self.num_samples + 1):
            first = epoch * self.num_samples
            indices = np.arange(max(start, first), min(stop, first + self.num_samples), dtype=np.int64) - first
            pieces.append(self._epoch_shuffle(epoch)(indices))
        return np.concatenate(pieces)

    def _epoch_shuffle(self, epoch: int) -> Permutation:
        if self._shuffle is None or self._shuffle[0] != epoch:
            self._shuffle = epoch, Permutation(self.num_samples, derive_key("epoch", self.seed, epoch))
        return self._shuffle[1]


def _hash(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()

"""Token lengths of a split: a sidecar in the run directory, since shards know nothing of tokenizers."""

from __future__ import annotations

import io
from contextlib import closing
from pathlib import Path

import numpy as np

from crossguard.configs.progress import progress
from crossguard.data.loading.encoded import Encode
from crossguard.data.loading.reader import SampleError, ShardReader
from crossguard.data.loading.workers import results
from crossguard.data.shards.files import write_atomic

ROWS_PER_TASK = 1024


def token_lengths(
    reader: ShardReader, encode: Encode, folder: Path, num_workers: int, *, speak: bool = False
) -> np.ndarray:
    """Length of each row's encoded text in tokens, of all fields that are read; 0 without text.

    Kept as `<folder>/<split>-<encode>-<manifest>.npy`, the latter two being the starts of fingerprints, so that a
    changed tokenizer or changed shards are counted anew. Lengths only plan batches: a sample that cannot be read
    counts as 0 here, and is refused when its turn comes.

    Args:
        reader: the split.
        encode: whose `text_length` counts.
        folder: where the sidecar lies.
        num_workers: processes that count; 0 counts here.
        speak: show progress.

    Returns:
        uint32[len(reader)]
    """
    path = folder / f"{reader.split}-{encode.fingerprint[:16]}-{reader.manifest_hash[:16]}.npy"
    lengths = _load(path, len(reader))
    if lengths is None:
        lengths = _count(reader, encode, num_workers, speak)
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.save(buffer, lengths, allow_pickle=False)
        write_atomic(path, buffer.getvalue())
    return lengths


def _load(path: Path, samples: int) -> np.ndarray | None:
    """The sidecar, or None when there is none that fits."""
    try:
        lengths = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return lengths if lengths.dtype == np.uint32 and lengths.shape == (samples,) else None


def _count(reader: ShardReader, encode: Encode, num_workers: int, speak: bool) -> np.ndarray:
    starts = range(0, len(reader), ROWS_PER_TASK)
    counter = _TextLengths(reader, encode)
    # Starting processes takes longer than counting a few thousand texts.
    processes = min(num_workers, len(starts) // 8)
    counted = []
    parts = results(counter, starts, processes, preload=type(encode).__module__)
    with closing(parts), progress(f"token lengths of {reader.split}", len(reader), "posts", speak=speak) as shown:
        for lengths in parts:
            counted.append(lengths)
            shown.advance(len(lengths))
    return np.concatenate(counted)


class _TextLengths:
    """First row of a task -> the lengths of its rows."""

    def __init__(self, reader: ShardReader, encode: Encode):
        self.reader = reader
        self.encode = encode

    def __getitem__(self, start: int) -> np.ndarray:
        rows = range(start, min(start + ROWS_PER_TASK, len(self.reader)))
        return np.array([self._length(row) for row in rows], dtype=np.uint32)

    def received(self, lengths: np.ndarray) -> np.ndarray:
        """The lengths, copied."""
        return lengths.copy()

    def _length(self, row: int) -> int:
        try:
            return self.encode.text_length(self.reader.read_head(row))
        except SampleError:
            return 0

"""How results travel from the processes that make them to the one that trains: through memory that both have mapped.

New shared memory for every batch would cost more than copying into memory that is in use already, since its pages come
one by one. So each process has a few places that it fills in turn.
"""

from __future__ import annotations

import mmap
import os
import pickle
from multiprocessing import reduction
from typing import Any

import numpy as np

from crossguard.configs.errors import JobError

# Address space of a place, beyond any batch; only what is written takes up memory.
PLACE_BYTES = 1 << 30
# Arrays start at multiples of a cache line.
ALIGNMENT = 64


class Places:
    """Memory that a process and those that are started with this object share. It has no name, so that nothing is left
    behind however they end, and the size of /dev/shm, which containers keep small, does not limit it.

    Args:
        count: of places, each of which holds one result.
    """

    def __init__(self, count: int):
        descriptor = os.memfd_create("crossguard-batches")
        os.ftruncate(descriptor, count * PLACE_BYTES)
        self._map(descriptor)

    def _map(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._memory = np.frombuffer(mmap.mmap(descriptor, 0), dtype=np.uint8)

    def __getstate__(self) -> Any:
        return reduction.DupFd(self._descriptor)

    def __setstate__(self, state: Any) -> None:
        self._map(state.detach())

    def __del__(self) -> None:
        os.close(self._descriptor)

    def put(self, place: int, result: Any) -> list[int]:
        """Write a result into a place, over what it held: pickled, then the bytes of its arrays.

        Returns:
            The sizes of these parts, for `get`.

        Raises:
            JobError: it is too large.
        """
        arrays: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(result, protocol=5, buffer_callback=arrays.append)
        contents: list[bytes | memoryview] = [pickled, *(array.raw() for array in arrays)]
        parts = [np.frombuffer(content, dtype=np.uint8) for content in contents]
        sizes = [len(part) for part in parts]
        if sum(map(_aligned, sizes)) > PLACE_BYTES:
            raise JobError(
                f"a batch of {sum(sizes)} bytes, the most is {PLACE_BYTES}; lower train.micro_batch_size or "
                "evaluation.batch_size"
            )
        for part, target in zip(parts, self._parts(place, sizes), strict=True):
            target[:] = part
        return sizes

    def get(self, place: int, sizes: list[int]) -> Any:
        """The result in a place; its arrays are the place's own memory, which the next one there overwrites."""
        pickled, *arrays = self._parts(place, sizes)
        return pickle.loads(pickled.data, buffers=arrays)

    def _parts(self, place: int, sizes: list[int]) -> list[np.ndarray]:
        parts, start = [], place * PLACE_BYTES
        for size in sizes:
            parts.append(self._memory[start : start + size])
            start += _aligned(size)
        return parts


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT

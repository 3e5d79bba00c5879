"""How results travel from the processes that make them to the one that trains: pickled, their arrays through memory
that both see.

Torch would share each tensor by itself, in new memory every time, whose first touch takes longer than copying into
memory that is in use, and with a file descriptor for as long as the tensor lives. Here a worker writes its arrays into
the next of a few places, which are mapped once, and they are copied out when they are received.
"""

from __future__ import annotations

import mmap
import os
import pickle
from dataclasses import dataclass
from multiprocessing import reduction
from typing import Any

import numpy as np

# Address space of a place, beyond any batch; only what is written takes up memory.
PLACE_BYTES = 1 << 28
# Arrays start at multiples of a cache line.
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Parcel:
    """A result on its way."""

    place: int
    pickled: bytes
    # First byte and size of each array in the place.
    arrays: list[tuple[int, int]]


class Places:
    """Memory that a process and those that it starts with this object share; it has no name, so that nothing is left
    behind however they end, and /dev/shm, which containers keep small, does not limit it.

    Args:
        count: of places, each of which holds one result.
    """

    def __init__(self, count: int):
        self._descriptor = os.memfd_create("crossguard-places")
        os.ftruncate(self._descriptor, count * PLACE_BYTES)
        self._map()

    def _map(self) -> None:
        self._memory = np.frombuffer(mmap.mmap(self._descriptor, 0), dtype=np.uint8)

    def __getstate__(self) -> Any:
        return reduction.DupFd(self._descriptor)

    def __setstate__(self, state: Any) -> None:
        self._descriptor = state.detach()
        self._map()

    def __del__(self) -> None:
        os.close(self._descriptor)

    def put(self, place: int, result: Any) -> Parcel:
        """Write a result's arrays into a place, over what it held."""
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(result, protocol=5, buffer_callback=buffers.append)
        start, arrays = place * PLACE_BYTES, []
        for buffer in buffers:
            array = np.frombuffer(buffer.raw(), dtype=np.uint8)
            if start + len(array) > (place + 1) * PLACE_BYTES:
                return Parcel(place, pickle.dumps(result), [])
            self._memory[start : start + len(array)] = array
            arrays.append((start, len(array)))
            start += -(-len(array) // ALIGNMENT) * ALIGNMENT
        return Parcel(place, pickled, arrays)

    def take(self, parcel: Parcel, pinned: bool = False) -> Any:
        """The result. Its arrays are copied once, `pinned` into page-locked memory if it can do that."""
        views = [self._memory[start : start + size] for start, size in parcel.arrays]
        if pinned:
            result = pickle.loads(parcel.pickled, buffers=views)
            if hasattr(result, "pin_memory"):
                return result.pin_memory()
        return pickle.loads(parcel.pickled, buffers=[view.copy() for view in views])

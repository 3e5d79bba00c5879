"""The shuffle of one group: blocks of rows in a permuted order, and a permutation inside each window of blocks.

A whole permutation would touch every shard of a dataset at once. Here a reader works in `WINDOW_BLOCKS` blocks, about a
shard each, at any time, so that a node's cache need not hold the dataset. Two neighbours of the order come from one
block in one case of `WINDOW_BLOCKS`, which is all the correlation that is left.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from crossguard.data.loading.permutation import Permutation, derive_key

# Correlation of neighbours: 1/64 = .016.
WINDOW_BLOCKS = 64
KEPT_WINDOWS = 4


class WindowedShuffle:
    """For each epoch another bijection of 0 … size-1.

    Args:
        size: rows of the group.
        block: rows of a block; the last one may hold fewer.
        name: what the keys are derived from, beside epoch and window.
    """

    def __init__(self, size: int, block: int, *name: int | str):
        self.size, self.block, self.name = size, block, name
        self.blocks = -(-size // block)
        # What the last block lacks.
        self.lack = self.blocks * block - size
        self._kept: OrderedDict[tuple[int, int], Permutation] = OrderedDict()

    def __call__(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """int64: the ordinals that come at `positions` of an epoch."""
        order, short = self._blocks(epoch)
        window = self._padded(positions, short) // self.block // WINDOW_BLOCKS
        shuffled = np.empty_like(positions)
        for number in np.unique(window).tolist():
            inside = window == number
            start, permutation = self._window(epoch, number, short)
            shuffled[inside] = start + permutation(positions[inside] - start)
        slot, within = np.divmod(self._padded(shuffled, short), self.block)
        return order(slot) * self.block + within

    def inverse(self, epoch: int, ordinals: np.ndarray) -> np.ndarray:
        """int64: the positions of an epoch that `ordinals` come at."""
        order, short = self._blocks(epoch)
        block, within = np.divmod(ordinals, self.block)
        slot = order.inverse(block)
        shuffled = self._start(slot, short) + within
        window = slot // WINDOW_BLOCKS
        positions = np.empty_like(shuffled)
        for number in np.unique(window).tolist():
            inside = window == number
            start, permutation = self._window(epoch, number, short)
            positions[inside] = start + permutation.inverse(shuffled[inside] - start)
        return positions

    def _blocks(self, epoch: int) -> tuple[Permutation, int]:
        """The order of the blocks, and the slot where the short one came to lie."""
        order = self._permutation((epoch, -1), self.blocks)
        return order, int(order.inverse(np.array([self.blocks - 1]))[0])

    def _window(self, epoch: int, number: int, short: int) -> tuple[int, Permutation]:
        """The first position of a window, and its permutation."""
        slots = np.minimum(np.array([number, number + 1]) * WINDOW_BLOCKS, self.blocks)
        start, stop = self._start(slots, short).tolist()
        return start, self._permutation((epoch, number), stop - start)

    def _start(self, slots: np.ndarray, short: int) -> np.ndarray:
        """The first position of each slot: those behind the short block come earlier."""
        return slots * self.block - self.lack * (slots > short)

    def _padded(self, positions: np.ndarray, short: int) -> np.ndarray:
        """Positions as they would be if all blocks were full."""
        return positions + self.lack * (positions >= (short + 1) * self.block - self.lack)

    def _permutation(self, which: tuple[int, int], size: int) -> Permutation:
        """The one of a window, or of the blocks for window -1, in an epoch."""
        if which not in self._kept:
            self._kept[which] = Permutation(size, derive_key("window", *self.name, *which))
        self._kept.move_to_end(which)
        if len(self._kept) > KEPT_WINDOWS:
            self._kept.popitem(last=False)
        return self._kept[which]

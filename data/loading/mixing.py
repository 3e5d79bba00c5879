"""Mixing: from a position to a group and to how often that group was drawn before.

Positions are cut into cycles. In every cycle each group has its exact quota of slots, in an order that is permuted
anew; when the weights change at a step, the cycle in progress ends there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crossguard.data.loading.permutation import Permutation, derive_key

# Slots of a cycle: enough that quotas are close to the shares and the smallest group has one, not so many that the
# draws of a group would stray far from its reading window.
MIN_CYCLE, MAX_CYCLE = 4096, 65536
MIN_SLOTS_PER_GROUP = 8
KEPT_CYCLES = 4


def temperature_shares(sizes: np.ndarray, temperature: float, max_repeats: float) -> np.ndarray:
    """The share of each group: n^(1/T), normalised (Conneau and Lample, arXiv 1901.07291), capped.

    Args:
        sizes: int[G], samples of the groups.
        temperature: T ≥ 1; 1 leaves the groups as large as they are, a large one makes them equal.
        max_repeats: no group gets more than this many times the share that it has by its size; what is above goes to
            the others.

    Returns:
        float64[G], summing to 1.
    """
    natural = sizes / sizes.sum()
    # From the logarithm, since the powers of large groups overflow.
    wanted = np.where(sizes > 0, np.exp(np.log(np.maximum(natural, 1e-300)) / temperature), 0.0)
    limit = natural * max_repeats
    shares = wanted / wanted.sum()
    capped = np.zeros(len(sizes), dtype=bool)
    while np.any(shares[~capped] > limit[~capped] * (1 + 1e-12)):
        capped |= shares > limit
        free = wanted * ~capped
        shares = np.where(capped, limit, free / max(free.sum(), 1e-300) * (1 - limit[capped].sum()))
    return shares


def cycle_quotas(shares: np.ndarray) -> np.ndarray:
    """int64[G]: slots of each group in a cycle, by largest remainder; a group with a share has at least one slot."""
    given = shares[shares > 0]
    least = max(MIN_CYCLE, MIN_SLOTS_PER_GROUP * len(given))
    slots = int(np.clip(np.ceil(1 / given.min()), least, max(least, MAX_CYCLE)))
    quotas = np.floor(shares * slots).astype(np.int64)
    left = slots - int(quotas.sum())
    # Rounded first, so that the last bits of a division decide nothing.
    by_remainder = np.argsort(-np.round(shares * slots - quotas, 9), kind="stable")
    quotas[by_remainder[:left]] += 1
    return np.where(shares > 0, np.maximum(quotas, 1), 0)


@dataclass(frozen=True)
class Phase:
    """Positions from `start` on that are mixed by the same quotas."""

    start: int
    # int64[G]
    quotas: np.ndarray


class Mixing:
    """Which group each position draws from, and the number of that draw.

    Args:
        phases: by their start; the first starts at 0.
        seed: chooses the order inside the cycles.
    """

    def __init__(self, phases: Sequence[Phase], seed: int):
        self.phases = tuple(phases)
        self.seed = seed
        self._kept: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()
        # int64[phases, G]: draws of each group before a phase begins.
        self._base = np.zeros((len(self.phases), len(self.phases[0].quotas)), dtype=np.int64)
        for number, (phase, following) in enumerate(zip(self.phases, self.phases[1:], strict=False)):
            self._base[number + 1] = self._base[number] + self._drawn(number, following.start - phase.start)

    def draws(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(int64[n], int64[n]): group and draw of the positions [start, stop)."""
        pieces = []
        while start < stop:
            phase = self._phase_at(start)
            first, length = self.phases[phase].start, int(self.phases[phase].quotas.sum())
            cycle, offset = divmod(start - first, length)
            end = min(stop, first + (cycle + 1) * length)
            if phase + 1 < len(self.phases):
                end = min(end, self.phases[phase + 1].start)
            groups, ranks = self._cycle(phase, cycle)
            part = slice(offset, offset + end - start)
            base = self._base[phase] + cycle * self.phases[phase].quotas
            pieces.append((groups[part], base[groups[part]] + ranks[part]))
            start = end
        return np.concatenate([groups for groups, _ in pieces]), np.concatenate([draws for _, draws in pieces])

    def position(self, group: int, draw: int) -> int | None:
        """Where a draw of a group takes place; None when its quota ends before."""
        phase = int(np.searchsorted(self._base[:, group], draw, side="right")) - 1
        quotas = self.phases[phase].quotas
        if quotas[group] == 0:
            return None
        cycle, rank = divmod(draw - int(self._base[phase, group]), int(quotas[group]))
        groups, _ = self._cycle(phase, cycle)
        place = int(np.flatnonzero(groups == group)[rank])
        return self.phases[phase].start + cycle * int(quotas.sum()) + place

    def draws_before(self, group: int, position: int) -> int:
        """How often a group is drawn at positions below `position`."""
        phase = self._phase_at(position)
        return int((self._base[phase] + self._drawn(phase, position - self.phases[phase].start))[group])

    def _phase_at(self, position: int) -> int:
        return int(np.searchsorted([phase.start for phase in self.phases], position, side="right")) - 1

    def _drawn(self, phase: int, count: int) -> np.ndarray:
        """int64[G]: draws of each group in the first `count` positions of a phase."""
        quotas = self.phases[phase].quotas
        cycles, rest = divmod(count, int(quotas.sum()))
        groups, _ = self._cycle(phase, cycles)
        return cycles * quotas + np.bincount(groups[:rest], minlength=len(quotas))

    def _cycle(self, phase: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Group of each slot of a cycle, and how many slots before it are of the same group."""
        which = (phase, cycle)
        if which not in self._kept:
            quotas = self.phases[phase].quotas
            length = int(quotas.sum())
            slots = Permutation(length, derive_key("cycle", self.seed, phase, cycle))(np.arange(length))
            groups = np.repeat(np.arange(len(quotas)), quotas)[slots]
            ranks = np.empty(length, dtype=np.int64)
            ranks[np.argsort(groups, kind="stable")] = np.arange(length) - np.repeat(np.cumsum(quotas) - quotas, quotas)
            self._kept[which] = groups, ranks
        self._kept.move_to_end(which)
        if len(self._kept) > KEPT_CYCLES:
            self._kept.popitem(last=False)
        return self._kept[which]

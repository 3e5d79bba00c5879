"""Which rows belong together: the datasets of a split, and the strata (language × rarest policy) inside each.

Rows are numbered shard by shard, and inside a shard by stratum, as its index is sorted: so the counts that the manifest
has for each shard say which rows a stratum holds, and nothing needs to be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from crossguard.data.shards.manifest import ShardInfo


class Groups:
    """A partition of the rows 0 … n-1 into ordered groups, each made of runs of consecutive rows.

    Args:
        names: of the groups, G.
        shards: int[G], in how many shards each group lies.
        num_runs: of all groups together.
        runs: for each group, the row that each of its runs begins with, int64[…] ascending, and the runs' lengths.
    """

    def __init__(
        self,
        names: Sequence[str],
        shards: Sequence[int],
        num_runs: int,
        runs: Iterable[tuple[np.ndarray, np.ndarray]],
    ):
        self.names, self.shards = tuple(names), tuple(shards)
        # The runs of group g stand at _begin[g] … _begin[g + 1]: the row and the ordinal in the group that each starts
        # at. There may be as many as shards times strata, so they are written in place.
        self._first_row = np.empty(num_runs, dtype=np.int64)
        self._ordinal = np.empty(num_runs, dtype=np.int64)
        begin, sizes = [0], []
        for first_rows, lengths in runs:
            own = slice(begin[-1], begin[-1] + len(lengths))
            self._first_row[own] = first_rows
            np.cumsum(lengths, out=self._ordinal[own])
            self._ordinal[own] -= lengths
            begin.append(own.stop)
            sizes.append(int(lengths.sum(dtype=np.int64)))
        self._begin, self.sizes = np.array(begin), np.array(sizes, dtype=np.int64)
        self.num_rows = sum(sizes)

    def rows(self, group: int, ordinals: np.ndarray) -> np.ndarray:
        """int64: the rows of a group at `ordinals`, each in 0 … sizes[group]-1."""
        runs = slice(self._begin[group], self._begin[group + 1])
        ordinal, first_row = self._ordinal[runs], self._first_row[runs]
        run = np.searchsorted(ordinal, ordinals, side="right") - 1
        return first_row[run] + (ordinals - ordinal[run])

    def find(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The group of each row and its ordinal there; the reverse of `rows`."""
        order, sorted_first_row = self._by_row
        run = order[np.searchsorted(sorted_first_row, rows, side="right") - 1]
        group = np.searchsorted(self._begin, run, side="right") - 1
        return group, self._ordinal[run] + (rows - self._first_row[run])

    @cached_property
    def _by_row(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self._first_row)
        return order, self._first_row[order]


@dataclass(frozen=True)
class Layout:
    """The rows of a split, twice partitioned."""

    datasets: Groups
    strata: Groups
    # int64[S]: the dataset that each stratum is a part of.
    dataset_of_stratum: np.ndarray

    @property
    def num_rows(self) -> int:
        """Rows of the split."""
        return self.strata.num_rows

    @classmethod
    def of_shards(cls, datasets: Sequence[tuple[str, tuple[str, ...], Sequence[ShardInfo]]]) -> Layout:
        """The layout of datasets, each given by its name, the strata of its manifest and the split's shards."""
        counts = []
        for _, strata, shards in datasets:
            number = {name: position for position, name in enumerate(strata)}
            table = np.zeros((len(shards), len(strata)), dtype=np.uint32)
            for row, shard in enumerate(shards):
                for name, count in shard.strata.items():
                    table[row, number[name]] = count
            counts.append(table)
        return cls.of_counts([name for name, _, _ in datasets], [strata for _, strata, _ in datasets], counts)

    @classmethod
    def of_counts(cls, names: Sequence[str], strata: Sequence[Sequence[str]], counts: Sequence[np.ndarray]) -> Layout:
        """The layout of datasets from their names, the names of their strata and int[shards, strata] samples each."""
        sizes = [int(table.sum(dtype=np.int64)) for table in counts]
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        whole = [(np.array([start]), np.array([size])) for start, size in zip(starts, sizes, strict=True)]
        own_names = [f"{name}:{stratum}" for name, own in zip(names, strata, strict=True) for stratum in own]
        shards = np.concatenate([np.count_nonzero(table, axis=0) for table in counts]).tolist()
        runs = chain.from_iterable(map(_runs_of_strata, counts, starts))
        return cls(
            Groups(names, [len(table) for table in counts], len(whole), whole),
            Groups(own_names, shards, sum(shards), runs),
            np.repeat(np.arange(len(names)), [table.shape[1] for table in counts]),
        )


def _runs_of_strata(table: np.ndarray, start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each stratum, where its rows begin in each shard that has some, and how many there are."""
    per_shard = table.sum(axis=1, dtype=np.int64)
    # The row behind what was counted so far of each shard.
    row = start + np.cumsum(per_shard) - per_shard
    for column in table.T:
        inside = np.flatnonzero(column)
        yield row[inside], column[inside]
        row += column

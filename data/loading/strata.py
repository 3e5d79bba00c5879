"""Which rows belong together: the datasets of a split, and the strata (language × rarest policy) inside each.

Rows are numbered shard by shard, and inside a shard by stratum, as its index is sorted: so the counts that the manifest
has for each shard say which rows a stratum holds, and nothing needs to be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from crossguard.data.shards.manifest import ShardInfo


class Groups:
    """A partition of the rows 0 … n-1 into ordered groups, each made of runs of consecutive rows.

    Args:
        names: of the groups, G.
        first_rows: for each group, int64[…]: the row that each of its runs begins with, ascending.
        run_lengths: for each group, int[…]: the rows of each run.
        shards: int[G], in how many shards each group lies.
    """

    def __init__(
        self,
        names: Sequence[str],
        first_rows: Sequence[np.ndarray],
        run_lengths: Sequence[np.ndarray],
        shards: Sequence[int],
    ):
        self.names = tuple(names)
        self.shards = tuple(shards)
        self.sizes = np.array([lengths.sum(dtype=np.int64) for lengths in run_lengths], dtype=np.int64)
        self.num_rows = int(self.sizes.sum())
        # The runs of group g stand at _begin[g] … _begin[g + 1]: the row and the ordinal in the group that each starts
        # at. Written in place: there may be as many as shards times strata.
        self._begin = np.cumsum([0, *(len(rows) for rows in first_rows)])
        self._first_row = np.empty(self._begin[-1], dtype=np.int64)
        self._ordinal = np.empty(self._begin[-1], dtype=np.int64)
        for begin, rows, lengths in zip(self._begin, first_rows, run_lengths, strict=False):
            runs = slice(begin, begin + len(rows))
            self._first_row[runs] = rows
            np.cumsum(lengths, out=self._ordinal[runs])
            self._ordinal[runs] -= lengths

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
        sizes = np.array([table.sum(dtype=np.int64) for table in counts])
        first_rows, run_lengths = [], []
        for table, start in zip(counts, np.cumsum(sizes) - sizes, strict=True):
            per_shard = table.sum(axis=1, dtype=np.int64)
            # The row behind what was counted so far of each shard.
            row = start + np.cumsum(per_shard) - per_shard
            for column in table.T:
                inside = np.flatnonzero(column)
                first_rows.append(row[inside])
                run_lengths.append(column[inside])
                row += column
        datasets = Groups(
            names,
            [np.array([start]) for start in np.cumsum(sizes) - sizes],
            [np.array([size]) for size in sizes],
            [len(table) for table in counts],
        )
        own_names = [f"{name}:{stratum}" for name, own in zip(names, strata, strict=True) for stratum in own]
        return cls(
            datasets,
            Groups(own_names, first_rows, run_lengths, [len(lengths) for lengths in run_lengths]),
            np.repeat(np.arange(len(names)), [table.shape[1] for table in counts]),
        )

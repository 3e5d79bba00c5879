"""Redirects: which sample takes the place of one that must not or cannot be read.

The samples of a stratum stand on a circle in a keyed order; the place of a refused one goes to the next on the circle
that is not refused. So it makes no difference whether a sample was known to be bad when the order was made or was found
to be when it was read, all ranks agree without a word, and the rule can be run backwards. Where all of a stratum is
refused, the circle of the whole split decides, datasets of weight 0 included.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from crossguard.configs.errors import UserError
from crossguard.data.loading.permutation import Permutation, derive_key
from crossguard.data.loading.strata import Groups

WHOLE_SPLIT = -1


@dataclass(frozen=True)
class Redirects:
    """Where the place of a refused row goes.

    Args:
        strata: of the split.
        seed: chooses the circles.
        refused: int64[R], sorted, without duplicates.
        per_stratum: int64[S], how many of each stratum are refused.

    Raises:
        UserError: nothing is left to read.
    """

    strata: Groups
    seed: int
    refused: np.ndarray

    # int64[S]: how many of each stratum are refused.
    per_stratum: np.ndarray

    @classmethod
    def of(cls, strata: Groups, seed: int, refused: np.ndarray) -> Redirects:
        """The redirects around `refused`, int64[…] in any order."""
        nothing = np.zeros(0, dtype=np.int64)
        return cls(strata, seed, nothing, np.zeros(len(strata.names), dtype=np.int64)).with_refused(refused)

    def __post_init__(self) -> None:
        if len(self.refused) >= self.strata.num_rows:
            raise UserError(f"none of the split's {self.strata.num_rows} samples may be read (expired or refused)")

    def is_refused(self, rows: np.ndarray) -> np.ndarray:
        """bool, of the shape of `rows`."""
        if not len(self.refused):
            return np.zeros(rows.shape, dtype=bool)
        found = np.minimum(np.searchsorted(self.refused, rows), len(self.refused) - 1)
        return np.asarray(self.refused[found] == rows)

    def with_refused(self, rows: np.ndarray) -> Redirects:
        """The same circles, with more refused rows."""
        new = np.setdiff1d(rows, self.refused)
        if not len(new):
            return self
        more = np.bincount(self.strata.find(new)[0], minlength=len(self.strata.names))
        return Redirects(self.strata, self.seed, np.union1d(self.refused, new), self.per_stratum + more)

    def resolve(self, rows: np.ndarray) -> np.ndarray:
        """int64: each row, or the one that takes its place."""
        rows = np.array(rows, dtype=np.int64)
        places = np.flatnonzero(self.is_refused(rows))
        circles = self._circles(rows[places])
        while places.size:
            for circle in np.unique(circles).tolist():
                own = places[circles == circle]
                rows[own] = self._neighbours(rows[own], circle, 1)
            still = self.is_refused(rows[places])
            places, circles = places[still], circles[still]
        return rows

    def replaced_by(self, row: int) -> list[int]:
        """The refused rows whose places go to `row`; `resolve` backwards."""
        found = []
        stratum = int(self.strata.find(np.array([row]))[0][0])
        for circle in (stratum, WHOLE_SPLIT):
            before = self._neighbours(np.array([row]), circle, -1)
            while before != row and self.is_refused(before):
                if self._circles(before) == circle:
                    found.append(int(before[0]))
                before = self._neighbours(before, circle, -1)
        return found

    def _circles(self, rows: np.ndarray) -> np.ndarray:
        """For each row its stratum, or the whole split where the stratum has nothing left."""
        strata, _ = self.strata.find(rows)
        return np.where(self.per_stratum[strata] == self.strata.sizes[strata], WHOLE_SPLIT, strata)

    def _neighbours(self, rows: np.ndarray, circle: int, direction: int) -> np.ndarray:
        """The rows beside `rows` on a circle that all of them are on."""
        whole = circle == WHOLE_SPLIT
        size = self.strata.num_rows if whole else int(self.strata.sizes[circle])
        ordinals = rows if whole else self.strata.find(rows)[1]
        order = _circle(size, self.seed, circle)
        beside = order.inverse((order(ordinals) + direction) % size)
        return beside if whole else self.strata.rows(circle, beside)


@lru_cache(maxsize=256)
def _circle(size: int, seed: int, circle: int) -> Permutation:
    return Permutation(size, derive_key("redirect", seed, circle))

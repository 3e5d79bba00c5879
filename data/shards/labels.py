"""Known labels and how many of them violate, by language and policy: counted once, kept in the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crossguard.data.shards.manifest import ShardInfo

# Fractions are added up in the order of the posts; what lies behind these digits is rounding.
DIGITS = 6


class LabelSums:
    """Adds up the labels of posts."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, post: Mapping[str, Any]) -> None:
        """Count a post, given by its fields."""
        for policy, label in post["labels"].items():
            if label is not None:
                sums = self._sums.setdefault(f"{post['language']}/{policy}", [0.0, 0.0])
                sums[0] += 1
                sums[1] += label

    def result(self) -> dict[str, list[float]]:
        """ "<language>/<policy>" -> [known labels, their sum]."""
        return {name: [known, round(violating, DIGITS)] for name, (known, violating) in sorted(self._sums.items())}


@dataclass(frozen=True)
class LabelCounts:
    """The known labels of a split; a fractional label counts for its part on either side."""

    languages: tuple[str, ...]
    policies: tuple[str, ...]
    # float64[languages, policies]: known labels, and how many of them violate.
    known: np.ndarray
    violating: np.ndarray

    @classmethod
    def of_shards(cls, shards: Iterable[ShardInfo], policies: Sequence[str]) -> LabelCounts:
        """Those of all posts in `shards`; languages without any known label are there, too."""
        shards = tuple(shards)
        languages = sorted({name.rpartition("/")[0] for shard in shards for name in shard.strata})
        table = np.zeros((2, len(languages), len(policies)))
        row, column = ({name: place for place, name in enumerate(names)} for names in (languages, policies))
        for shard in shards:
            for name, sums in shard.labels.items():
                language, _, policy = name.rpartition("/")
                table[:, row[language], column[policy]] += sums
        return cls(tuple(languages), tuple(policies), *table)

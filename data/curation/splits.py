"""Splits for posts that name none: by a hash of the group (or the id), so that they never depend on order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from crossguard.data.records import Post

_HASH_NAME = b"crossguard.split"  # a hash of its own, so that a split says nothing about a post's key
_RANGE = 1 << 64


class Splitter:
    """Assigns splits with given shares."""

    def __init__(self, shares: Mapping[str, float]):
        self._ends: list[tuple[float, str]] = []
        end = 0.0
        # Sorted, so that the order in a recipe does not count.
        for name, share in sorted(shares.items()):
            if share > 0:
                end += share
                self._ends.append((end * _RANGE, name))

    def split_of(self, post: Post) -> str:
        """The post's own split, else that of its group, else that of its id."""
        if post.split is not None:
            return post.split
        text = f"group\0{post.group}" if post.group is not None else f"id\0{post.id}"
        draw = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=_HASH_NAME).digest(), "little")
        return next((name for end, name in self._ends if draw < end), self._ends[-1][1])

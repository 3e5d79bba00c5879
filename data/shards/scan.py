"""The scan: reads a source once, checks every record, and spools what is right."""

from __future__ import annotations

import itertools

import numpy as np

from crossguard.configs.errors import UserError
from crossguard.configs.progress import progress
from crossguard.data.curation.governance import RULES, left_out_by
from crossguard.data.curation.splits import Splitter
from crossguard.data.records import Post, RecordError, parse_post
from crossguard.data.shards.media import FolderGuard
from crossguard.data.shards.spool import SpoolWriter
from crossguard.data.sources.base import Record, Source
from crossguard.data.taxonomy import Taxonomy


class Errors:
    """What is wrong with the posts: all in words or, where there are too many, each kind of error once."""

    def __init__(self, listed: int):
        self._limit = listed
        self._lines: list[str] = []
        self._kinds: dict[str, tuple[str, int]] = {}  # message -> where it stands first, and how often
        self._count = 0

    def add(self, place: str, message: str) -> None:
        """One more; `message` is "field: what is wrong"."""
        self._count += 1
        if self._count <= self._limit:
            self._lines.append(f"{place}: {message}")
        if message in self._kinds or len(self._kinds) < self._limit:
            first, count = self._kinds.get(message, (place, 0))
            self._kinds[message] = first, count + 1

    def add_unlisted(self, count: int) -> None:
        """So many more, in no words."""
        self._count += count

    def raise_any(self) -> None:
        """
        Raises:
            UserError: if anything was wrong, with all of it.
        """
        if not self._count:
            return
        lines = self._lines if self._count <= self._limit else self._folded()
        noun = "error" if self._count == 1 else "errors"
        raise UserError("\n".join([*lines, f"{self._count} {noun} in the posts; nothing was built"]))

    def _folded(self) -> list[str]:
        """A wrong column is wrong in every row: it must not hide what else is wrong."""
        lines = []
        for message, (place, count) in self._kinds.items():
            lines.append(f"{place}: {message}" + (f" (and {count - 1} more like it)" if count > 1 else ""))
        hidden = self._count - sum(count for _, count in self._kinds.values())
        return lines + ([f"… and {hidden} more (build.max_errors_listed={self._limit})"] if hidden else [])


def scan(source: Source, taxonomy: Taxonomy, splitter: Splitter, spool: SpoolWriter, now: float, listed: int) -> None:
    """Check and spool every post of `source`.

    Args:
        source: what is read.
        taxonomy: the policies that labels may name.
        splitter: assigns splits to the posts that name none.
        spool: receives the posts.
        now: seconds since 1970, for `expires_at`.
        listed: how many errors are told in words.

    Raises:
        UserError: listing what is wrong with all posts, or saying that there are none.
    """
    errors = Errors(listed)
    guard = FolderGuard()
    with progress("scan", None, "posts") as shown:
        for record in itertools.starmap(Record, source.records()):
            post = _checked(record, taxonomy, errors)
            if post is not None and _media_inside(post, record, guard, errors):
                _spool(post, record, splitter, spool, now)
            shown.advance()
    repeated = _repeated(spool.rows["key"])
    for number, first in repeated[:listed]:
        errors.add(spool.place(number), f"id: stands already at {spool.place(first)}")
    errors.add_unlisted(len(repeated[listed:]))
    errors.raise_any()
    if not len(spool.rows):
        raise UserError("data.path: holds no posts")


def _checked(record: Record, taxonomy: Taxonomy, errors: Errors) -> Post | None:
    if record.raw is None:
        errors.add(record.place, record.error or "line: could not be read")
        return None
    try:
        return parse_post(record.raw, taxonomy)
    except RecordError as error:
        for name, message in error.errors:
            errors.add(record.place, f"{name}: {message}")
        return None


def _media_inside(post: Post, record: Record, guard: FolderGuard, errors: Errors) -> bool:
    """Whether the media lie in their folder, also after following links."""
    inside = True
    for name, item in post.media():
        if isinstance(item, bytes):
            continue
        if record.media_root is None:
            errors.add(record.place, f"{name}: this source has no folder that a path could start from; hand over bytes")
            inside = False
        elif guard.leaves(record.media_root, item):
            errors.add(record.place, f"{name}: leaves the posts' folder through a symbolic link")
            inside = False
    return inside


def _spool(post: Post, record: Record, splitter: Splitter, spool: SpoolWriter, now: float) -> None:
    rule = left_out_by(post, now)
    if rule is None:
        spool.add(post, splitter.split_of(post), record.place, record.media_root)
    else:
        spool.add_left_out(post, RULES.index(rule), record.place)


def _repeated(keys: np.ndarray) -> list[tuple[int, int]]:
    """(number, first number) of every post whose id was given before, in the order of the source."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    first = np.ones(len(keys), dtype=bool)
    first[1:] = ordered[1:] != ordered[:-1]
    # For each post in the sorted order, where the run of its key starts.
    starts = np.maximum.accumulate(np.where(first, np.arange(len(keys)), 0))
    return sorted(zip(order[~first].tolist(), order[starts[~first]].tolist(), strict=True))

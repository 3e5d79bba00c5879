"""The spool: every valid post on disk while a build runs, with a compact row in memory for each.

It lies in the build's own folder and is removed with it. A record is KEY.json, KEY.txt, KEY.texts.json, a description
of the media and the post's place, one behind the other; media that a source hands over as bytes lie in front of it.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from crossguard.configs.errors import JobError
from crossguard.data.records import Media, Post, canonical_json, epoch_seconds, post_key
from crossguard.data.shards.files import pread
from crossguard.data.shards.index import AUDIO, IMAGE, TEXT, VIDEO
from crossguard.data.taxonomy import POSITIVE_FROM

FILE_NAME = "spool.bin"


def row_dtype(num_policies: int) -> np.dtype:
    """A post in memory: where its record lies and what decides its shard."""
    return np.dtype(
        [
            ("key", "S16"),
            ("offset", "<u8"),
            ("post_bytes", "<u4"),
            ("text_bytes", "<u4"),
            ("texts_bytes", "<u4"),
            ("media_bytes", "<u4"),
            ("place_bytes", "<u4"),
            ("expires_at", "<i8"),
            ("split", "<u2"),
            ("language", "<u4"),
            ("stratum", "<u4"),
            ("modalities", "<u2"),
            ("left_out", "<u1"),  # 0, or 1 + the number of the rule in governance.RULES
            ("labeled", "?"),  # at least one label is known
            ("positive", "?", (num_policies,)),
        ]
    )


class SpoolWriter:
    """Appends posts; `rows` are theirs in the order of their arrival."""

    def __init__(self, path: Path, policies: tuple[str, ...]):
        self.path = path
        self._file: BinaryIO = path.open("wb")
        self._offset = 0
        self._policies = policies
        self._rows = np.zeros(1024, dtype=row_dtype(len(policies)))
        self._count = 0
        # Numbers of splits, languages and media folders, in the order of their arrival.
        self.splits: dict[str, int] = {}
        self.languages: dict[str, int] = {}
        self.roots: dict[str, int] = {}

    def add(self, post: Post, split: str, place: str, root: Path | None) -> None:
        """Append a post that may be used."""
        description = self._describe_media(post, root) if post.media() else b""
        content = canonical_json({**post.to_json(), "split": split})
        text = post.text.encode() if post.text is not None else b""
        further = post.further_texts()
        texts = canonical_json(further) if further else b""
        row = self._append(post, (content, text, texts, description), place)
        row["split"] = self.splits.setdefault(split, len(self.splits))
        row["language"] = self.languages.setdefault(post.language, len(self.languages))
        row["expires_at"] = epoch_seconds(post.expires_at) if post.expires_at else 0
        row["modalities"] = _modalities(post)
        row["labeled"] = bool(post.labels)
        row["positive"] = [post.labels.get(policy, 0.0) >= POSITIVE_FROM for policy in self._policies]

    def add_left_out(self, post: Post, rule: int, place: str) -> None:
        """Remember the key, the place and the expiry of a post that is left out, and nothing else of it."""
        row = self._append(post, (b"", b"", b"", b""), place)
        row["left_out"] = 1 + rule
        row["expires_at"] = epoch_seconds(post.expires_at) if post.expires_at else 0

    @property
    def rows(self) -> np.ndarray:
        """Rows of `row_dtype`, one a post."""
        return self._rows[: self._count]

    def flush(self) -> None:
        """Let readers see all that was added."""
        self._file.flush()

    def close(self) -> None:
        """Write everything to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def place(self, number: int) -> str:
        """Where the post of a row stood in the source."""
        self.flush()
        with self.path.open("rb") as file:
            return SpoolReader(file).place(self._rows[number])

    def _append(self, post: Post, parts: tuple[bytes, bytes, bytes, bytes], place: str) -> Any:
        if self._count == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        row = self._rows[self._count]
        self._count += 1
        row["key"] = post_key(post.id)
        row["offset"] = self._offset
        where = place.encode(errors="backslashreplace")
        for name, part in zip(_PARTS, (*parts, where), strict=True):
            row[name] = len(part)
            self._write(part)
        return row

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._offset += len(data)

    def _describe_media(self, post: Post, root: Path | None) -> bytes:
        folder = str((root or Path()).resolve())
        description: dict[str, Any] = {
            "id": post.id,
            "root": self.roots.setdefault(folder, len(self.roots)),
            "images": [self._place_media(item) for item in post.images],
        }
        for name in ("video", "audio"):
            item = getattr(post, name)
            if item is not None:
                description[name] = self._place_media(item)
        return canonical_json(description)

    def _place_media(self, item: Media) -> str | list[int]:
        """A path as it is; bytes go into the spool and become [offset, size]."""
        if isinstance(item, str):
            return item
        start = self._offset
        self._write(item)
        return [start, len(item)]


_PARTS = ("post_bytes", "text_bytes", "texts_bytes", "media_bytes", "place_bytes")


class SpoolReader:
    """Reads records back by their rows."""

    def __init__(self, file: BinaryIO):
        self._descriptor = file.fileno()

    def parts(self, row: Any) -> tuple[bytes, bytes, bytes, bytes, bytes]:
        """KEY.json, KEY.txt, KEY.texts.json, the description of the media and the place of a post; empty where there is
        none."""
        sizes = [int(row[name]) for name in _PARTS]
        data = self.bytes_at(int(row["offset"]), sum(sizes))
        post, text, texts, media, _ = itertools.accumulate(sizes)
        return data[:post], data[post:text], data[text:texts], data[texts:media], data[media:]

    def place(self, row: Any) -> str:
        """Where the post stood in the source."""
        return self.parts(row)[-1].decode()

    def bytes_at(self, offset: int, size: int) -> bytes:
        """A range of the spool."""
        data = pread(self._descriptor, offset, size)
        if len(data) < size:
            raise JobError(
                f"build: {FILE_NAME} is cut short; remove the folder .build beside the shards and start again"
            )
        return data


def read_description(data: bytes) -> dict[str, Any]:
    """The description of a post's media, as `SpoolWriter` wrote it."""
    value: dict[str, Any] = json.loads(data)
    return value


def _modalities(post: Post) -> int:
    given: Iterable[tuple[int, Any]] = (
        (TEXT, post.text is not None or post.further_texts()),
        (IMAGE, post.images),
        (VIDEO, post.video is not None),
        (AUDIO, post.audio is not None),
    )
    return sum(bit for bit, present in given if present)

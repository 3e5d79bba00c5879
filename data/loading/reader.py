"""Random access to the samples of a split: one `pread` each, checked against the index."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from crossguard.configs.errors import JobError, UserError
from crossguard.data.shards.files import pread
from crossguard.data.shards.index import INDEX_DTYPE, TEXT, hex_keys, read_index
from crossguard.data.shards.manifest import Manifest, ShardInfo
from crossguard.data.shards.media import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

# A tar is a row of blocks of this size; every member starts with one that names it.
BLOCK = 512
MAX_OPEN_SHARDS = 64
HEAD_EXTENSIONS = ("json", "txt")
# Enough for the members before the media, beside the text itself, in nearly every post.
HEAD_BYTES = 8192


class SampleError(Exception):
    """A sample that cannot be used; the others can. The reason holds nothing of its content."""

    def __init__(self, row: int, key: str, reason: str):
        super().__init__(row, key, reason)
        self.row, self.key, self.reason = row, key, reason

    def __str__(self) -> str:
        return f"sample {self.key} (row {self.row}): {self.reason}"


@dataclass(frozen=True, slots=True)
class RawSample:
    """A post as it lies in a shard: its fields and the bytes of its media."""

    # The post's fields but text and media (KEY.json).
    post: dict[str, Any]
    text: str | None = None
    # The files' bytes, in the order of the post.
    images: list[bytes] = field(default_factory=list)
    video: bytes | None = None
    audio: bytes | None = None

    @property
    def id(self) -> str:
        """The post's id."""
        return str(self.post["id"])

    @property
    def language(self) -> str:
        """Language code; "und" when none was given."""
        return str(self.post.get("language") or "und")


class ShardReader:
    """The samples of one split, by row: 0 … len-1 in the order of the manifest.

    Can be sent to other processes: what it has opened stays behind, and is opened again where it is used.

    Args:
        shards_dir: the folder that holds the manifest.
        manifest: what lies in it.
        split: e.g. "train".

    Raises:
        UserError: the manifest has no such split.
    """

    def __init__(self, shards_dir: Path, manifest: Manifest, split: str):
        self.shards_dir = Path(shards_dir)
        self.split = split
        self.manifest_hash = manifest.sha256
        self.shards: tuple[ShardInfo, ...] = manifest.shards_of(split)
        if not self.shards:
            raise UserError(f"{self.shards_dir}: no split '{split}'; it has {', '.join(manifest.splits) or 'none'}")
        self._ends = np.cumsum([shard.samples for shard in self.shards])
        self._forget()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_indexes", "_files")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def _forget(self) -> None:
        self._indexes: dict[int, np.ndarray] = {}
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()

    @property
    def rows_index(self) -> np.ndarray:
        """`INDEX_DTYPE[len(self)]`: the index rows of the whole split."""
        return np.concatenate([self._index(number) for number in range(len(self.shards))])

    def expired_rows(self, now: float) -> np.ndarray:
        """int64[…]: the rows whose posts must not be read any more at `now`, in seconds since 1970."""
        expires_at = self.rows_index["expires_at"]
        return np.flatnonzero((expires_at != 0) & (expires_at <= now))

    def readable_rows(self, now: float) -> np.ndarray:
        """int64[…]: all other rows."""
        return np.setdiff1d(np.arange(len(self)), self.expired_rows(now), assume_unique=True)

    def read(self, row: int) -> RawSample:
        """One sample.

        Raises:
            SampleError: its bytes are not those that were written, or cannot be parsed.
            UserError: its shard is missing.
            JobError: its shard cannot be read.
        """
        shard, entry = self._locate(row)
        data = self._pread(shard, int(entry["offset"]), int(entry["size"]))
        key = hex_keys(entry[None])[0]
        if xxhash.xxh3_64_intdigest(data) != entry["digest"]:
            raise SampleError(
                row, key, f"damaged: its bytes in {self.shards[shard].path} are not those that were written"
            )
        return self._parse(row, key, data)

    def read_head(self, row: int) -> RawSample:
        """One sample without its media and without the check of its bytes: much cheaper where media are large."""
        shard, entry = self._locate(row)
        key = hex_keys(entry[None])[0]
        head = int(entry["text_bytes"]) + HEAD_BYTES
        for size in (head, int(entry["size"])):
            data = self._pread(shard, int(entry["offset"]), min(size, int(entry["size"])))
            try:
                sample = self._parse(row, key, data, head_only=True)
            except SampleError:
                if size == head:
                    continue  # the fields are longer than expected
                raise
            if sample.text is not None or not entry["modalities"] & TEXT:
                break
        return sample

    def _locate(self, row: int) -> tuple[int, np.ndarray]:
        """The number of the shard and the index entry."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of split '{self.split}', which has {len(self)}")
        shard = int(np.searchsorted(self._ends, row, side="right"))
        index = self._index(shard)
        return shard, index[row - int(self._ends[shard]) + len(index)]

    def _index(self, shard: int) -> np.ndarray:
        if shard not in self._indexes:
            info = self.shards[shard]
            rows = read_index(self.shards_dir / info.index_path)
            if len(rows) != info.samples or rows.dtype != INDEX_DTYPE:
                raise UserError(
                    f"{self.shards_dir / info.index_path}: {len(rows)} rows, the manifest says {info.samples}; "
                    "build the shards again"
                )
            self._indexes[shard] = rows
        return self._indexes[shard]

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        path = self.shards_dir / self.shards[shard].path
        try:
            if shard not in self._files:
                self._files[shard] = _OpenFile(path)
            self._files.move_to_end(shard)
            if len(self._files) > MAX_OPEN_SHARDS:
                self._files.popitem(last=False)
            return pread(self._files[shard].descriptor, offset, size)
        except FileNotFoundError:
            raise UserError(f"{path}: the shard is missing; restore it, or build the shards again") from None
        except OSError as error:
            raise JobError(f"{path}: the shard cannot be read ({error.strerror}); check the storage") from error

    def _parse(self, row: int, key: str, data: bytes, head_only: bool = False) -> RawSample:
        try:
            return _assemble(_members(data, key, head_only))
        except (ValueError, KeyError, TypeError) as error:
            # The error's own text may quote the post.
            raise SampleError(row, key, f"cannot be parsed ({type(error).__name__})") from None


class _OpenFile:
    """A descriptor that is closed with its last reference."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _members(data: bytes, key: str, head_only: bool) -> Iterator[tuple[str, bytes]]:
    """(extension, content) of the members in a range of a tar; raises ValueError when it is no such range.

    Much faster than `tarfile`, and all that our own shards need: short names, regular files.
    """
    start = 0
    while start + BLOCK <= len(data):
        header = data[start : start + BLOCK]
        name = header[:100].rstrip(b"\0").decode()
        if not name.startswith(f"{key}.") or header[156:157] not in (b"0", b"\0"):
            raise ValueError("unexpected member")
        extension = name.rpartition(".")[2]
        if head_only and extension not in HEAD_EXTENSIONS:
            return
        size = int(header[124:136].rstrip(b"\0 "), 8)
        start += BLOCK
        if start + size > len(data):
            raise ValueError("cut short")
        yield extension, data[start : start + size]
        start += -(-size // BLOCK) * BLOCK


def _assemble(members: Iterator[tuple[str, bytes]]) -> RawSample:
    """A sample from its members, which are sorted: fields, text, then media."""
    post: dict[str, Any] | None = None
    text: str | None = None
    images: list[bytes] = []
    video = audio = None
    for extension, content in members:
        if extension == "json":
            post = json.loads(content)
        elif extension == "txt":
            text = content.decode()
        elif extension in IMAGE_EXTENSIONS:
            images.append(content)
        elif extension in VIDEO_EXTENSIONS:
            video = content
        elif extension in AUDIO_EXTENSIONS:
            audio = content
        else:
            raise ValueError("unknown extension")
    if post is None:
        raise ValueError("no fields")
    return RawSample(post, text, images, video, audio)

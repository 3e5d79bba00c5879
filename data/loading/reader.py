"""Random access to the samples of a split: one `pread` each, checked against the index.

Indexes are mapped into memory shard by shard when they are first needed: processes of a node share their pages, and
what is open at a time is bounded, whatever the number of shards.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

import numpy as np
import xxhash

from crossguard.configs.errors import UserError
from crossguard.data.loading.sample import RawSample, parse_sample
from crossguard.data.records import post_key
from crossguard.data.shards.files import pread
from crossguard.data.shards.folder import ShardFolder
from crossguard.data.shards.index import INDEX_DTYPE, hex_keys, map_index
from crossguard.data.shards.manifest import ShardInfo
from crossguard.data.shards.storage import LostError, with_retries

# Tars, and as many indexes; each holds a descriptor, of which a process usually may have 1024.
MAX_OPEN_SHARDS = 128
# Enough for the members before the media, beside the text itself, in nearly every post.
HEAD_BYTES = 8192
T = TypeVar("T")


class SampleError(Exception):
    """A sample that cannot be used; the others can. The reason holds nothing of its content."""

    def __init__(self, row: int, key: str, reason: str):
        super().__init__(row, key, reason)
        self.row, self.key, self.reason = row, key, reason

    def __str__(self) -> str:
        return f"sample {self.key} (row {self.row}): {self.reason}"


class ShardReader:
    """The samples of one split, by row: 0 … len-1 in the order of the manifest, one folder after the other.

    Can be sent to other processes: what it has opened stays behind, and is opened again where it is used. Storage that
    fails for a moment is tried again; it never makes a `SampleError`.

    Args:
        folders: sets of shards; those without the split add nothing.
        split: e.g. "train".

    Attributes:
        shards: of the split, over all folders.
        starts: int64[len(shards) + 1], the first row of each shard, then the number of rows.
        manifest_hash: stands for all folders: the hash of the only manifest, or one over the list of hashes.

    Raises:
        UserError: no folder has such a split.
    """

    def __init__(self, folders: Sequence[ShardFolder], split: str):
        self.split = split
        self.folders = tuple(folders)
        self.manifest_hash = _joint_hash([folder.manifest.sha256 for folder in folders])
        found = [(shard, number) for number, one in enumerate(folders) for shard in one.manifest.shards_of(split)]
        if not found:
            splits = sorted({name for folder in folders for name in folder.manifest.splits})
            raise UserError(f"{self.place}: no split '{split}'; it has {', '.join(splits) or 'none'}")
        self.shards: tuple[ShardInfo, ...] = tuple(shard for shard, _ in found)
        self._folder_numbers = [number for _, number in found]
        self.starts = np.cumsum([0, *(shard.samples for shard in self.shards)])
        self._forget()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_indexes", "_tars", "_compared")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def _forget(self) -> None:
        self._indexes: _Recent[np.ndarray] = _Recent()
        self._tars: _Recent[_OpenFile] = _Recent()
        self._compared = np.zeros(len(self.shards), dtype=bool)

    @property
    def place(self) -> str:
        """Where the shards lie, for messages."""
        return ", ".join(folder.location for folder in self.folders)

    def shard_of(self, row: int) -> int:
        """The number of the shard that holds a row.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of split '{self.split}', which has {len(self)}")
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def folder_of(self, shard: int) -> ShardFolder:
        """The folder of a shard, whose manifest names the strata in its index."""
        return self.folders[self._folder_numbers[shard]]

    def column(self, name: str) -> np.ndarray:
        """[len(self)]: a field of `INDEX_DTYPE`, e.g. "text_bytes"; zero where an index is missing."""
        values = np.zeros(len(self), dtype=INDEX_DTYPE[name])
        for shard, index in self._all_indexes():
            values[self.starts[shard] : self.starts[shard + 1]] = index[name]
        return values

    def row_of(self, id: str) -> int | None:
        """The row of a post, if the split has it."""
        key = np.bytes_(post_key(id))
        for shard, index in self._all_indexes():
            if len(found := np.flatnonzero(index["key"] == key)):
                return int(self.starts[shard] + found[0])
        return None

    def expired_rows(self, now: float) -> np.ndarray:
        """int64[…]: the rows whose posts must not be read any more at `now`, in seconds since 1970."""
        expired = [np.empty(0, dtype=np.int64)]
        for shard, index in self._all_indexes():
            expires_at = index["expires_at"]
            expired.append(self.starts[shard] + np.flatnonzero((expires_at != 0) & (expires_at <= now)))
        return np.concatenate(expired)

    def readable_rows(self, now: float) -> np.ndarray:
        """int64[…]: all other rows."""
        return np.setdiff1d(np.arange(len(self)), self.expired_rows(now), assume_unique=True)

    def missing_rows(self) -> np.ndarray:
        """int64[…]: the rows of shards whose tar or index is not there; nothing is opened."""
        there = [folder.sizes(self.split).keys() for folder in self.folders]
        missing = [np.empty(0, dtype=np.int64)]
        for number, shard in enumerate(self.shards):
            paths = there[self._folder_numbers[number]]
            if shard.path not in paths or shard.index_path not in paths:
                missing.append(np.arange(self.starts[number], self.starts[number + 1]))
        return np.concatenate(missing)

    def read(self, row: int) -> RawSample:
        """One sample.

        Raises:
            SampleError: its bytes are not those that were written, cannot be parsed, or are not there at all.
            UserError: an index is damaged.
            JobError: the storage fails.
        """
        shard, key, entry = self._locate(row)
        data = self._pread(row, key, shard, entry)
        whole = _is_whole(data, entry)
        if not whole and self.folder_of(shard).cache is not None:
            # This node's copy may have rotted: it is compared as a whole, and fetched anew if so.
            self._tars.drop(shard)
            data = self._pread(row, key, shard, entry, check=True)
            whole = _is_whole(data, entry)
        if whole:
            return _parse(row, key, data)
        path = self.shards[shard].path
        if len(data) < entry["size"]:
            raise SampleError(row, key, f"the shard {path} is cut short")
        raise SampleError(row, key, f"damaged: its bytes in {path} are not those that were written")

    def read_head(self, row: int) -> RawSample:
        """One sample without its media and without the check of its bytes: much cheaper where media are large.

        Raises as `read` does.
        """
        shard, key, entry = self._locate(row)
        text_bytes = int(entry["text_bytes"])
        head = text_bytes + HEAD_BYTES
        try:
            return _parse(row, key, self._pread(row, key, shard, entry, head=head), text_bytes)
        except SampleError:
            if entry["size"] <= head:
                raise
        # The fields are longer than expected.
        return _parse(row, key, self._pread(row, key, shard, entry), text_bytes)

    def _locate(self, row: int) -> tuple[int, str, Any]:
        """The shard, the key and the index entry of a row."""
        shard = self.shard_of(row)
        number = row - int(self.starts[shard])
        try:
            entry = self._index(shard)[number]
        except LostError as error:
            path = self.shards[shard].path
            raise SampleError(row, f"unknown, number {number} of {path}", f"the index of {path} {error}") from None
        return shard, hex_keys(entry[None])[0], entry

    def _pread(
        self, row: int, key: str, shard: int, entry: Any, *, head: int | None = None, check: bool = False
    ) -> bytes:
        """The bytes of a sample, or the first of them, or less where the tar ends; `check` is for opening the tar."""
        folder, info = self.folder_of(shard), self.shards[shard]
        offset, size = int(entry["offset"]), int(entry["size"])
        size = size if head is None else min(size, head)

        def attempt() -> bytes:
            try:
                tar = self._tars.get(shard, lambda: _OpenFile(folder.open_tar(info, check=check)))
                return pread(tar.descriptor, offset, size)
            except OSError:
                self._tars.drop(shard)  # on a network file system an old descriptor may be what fails
                raise

        try:
            return with_retries(f"{folder.location}/{info.path}", attempt)
        except LostError as error:
            raise SampleError(row, key, f"the shard {info.path} {error}") from None

    def _all_indexes(self) -> Iterator[tuple[int, np.ndarray]]:
        """(shard, its index) of all shards that have one."""
        for folder in self.folders:
            folder.fetch_indexes(folder.manifest.shards_of(self.split))
        for shard in range(len(self.shards)):
            with suppress(LostError):
                yield shard, self._index(shard)

    def _index(self, shard: int) -> np.ndarray:
        return self._indexes.get(shard, lambda: self._open_index(shard))

    def _open_index(self, shard: int) -> np.ndarray:
        folder, info = self.folder_of(shard), self.shards[shard]
        place = f"{folder.location}/{info.index_path}"

        def attempt() -> np.ndarray:
            # Compared by reading, not through the map: where storage fails, a map ends the process by SIGBUS.
            file = _OpenFile(folder.open_index(info, check=not self._compared[shard]))
            return map_index(file.descriptor, place)

        index = with_retries(place, attempt)
        self._compared[shard] = True
        return index


class _Recent(Generic[T]):
    """Shard -> something open; the least recently used closes when there are too many.

    What is lost stays so in this process: it may have taken a download to know.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[int, T] = OrderedDict()
        self._lost: dict[int, str] = {}

    def get(self, shard: int, make: Callable[[], T]) -> T:
        """What is open, or else what `make` opens.

        Raises:
            LostError: now or before, by `make`.
        """
        if shard in self._lost:
            raise LostError(self._lost[shard])
        if shard not in self._open:
            try:
                self._open[shard] = make()
            except LostError as error:
                self._lost[shard] = str(error)
                raise
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]

    def drop(self, shard: int) -> None:
        """Close one."""
        self._open.pop(shard, None)


class _OpenFile:
    """A descriptor that is closed with its last reference."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def _is_whole(data: bytes, entry: Any) -> bool:
    return bool(xxhash.xxh3_64_intdigest(data) == entry["digest"])


def _parse(row: int, key: str, data: bytes, text_bytes: int | None = None) -> RawSample:
    try:
        return parse_sample(data, key, text_bytes)
    except (ValueError, KeyError, TypeError) as error:
        # The error's own text may quote the post.
        raise SampleError(row, key, f"cannot be parsed ({type(error).__name__})") from None


def _joint_hash(hashes: list[str]) -> str:
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()

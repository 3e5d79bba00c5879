"""Writes one shard: a plain tar that `webdataset` reads, and its index. The same posts give the same bytes."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from crossguard.data.records import canonical_json
from crossguard.data.shards.files import atomic_file, write_atomic
from crossguard.data.shards.index import INDEX_DTYPE, encode_index, hex_keys
from crossguard.data.shards.labels import LabelSums
from crossguard.data.shards.manifest import ShardInfo
from crossguard.data.shards.media import (
    AUDIO_EXTENSIONS,
    VIDEO_EXTENSIONS,
    RefusedMedia,
    check_clip,
    clip_extension,
    image_extension,
    image_kind,
    read_file,
)
from crossguard.data.shards.members import CHECKSUM, END_OF_TAR, SIZE, TEXTS
from crossguard.data.shards.plan import PlannedShard, load_rows
from crossguard.data.shards.spool import FILE_NAME, SpoolReader, read_description

BUILD_FOLDER = ".build"
DONE_FOLDER = "done"

# The header of a member (POSIX.1-1988 ustar) but for name, size and checksum, which is taken with spaces in its place:
# filling in three fields is four times faster than having `tarfile` write all sixteen.
_HEADER = bytearray(tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT))
_HEADER[100:108] = b"0000444\0"  # readable by all
_HEADER[CHECKSUM] = b" " * 8
_COPIED = ("key", "expires_at", "stratum", "text_bytes", "modalities")


@dataclass(frozen=True, slots=True)
class ShardTask:
    """What a writing process is told."""

    shards_dir: Path
    shard: PlannedShard
    roots: tuple[str, ...]
    strata: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DoneShard:
    """What became of a planned shard."""

    info: ShardInfo | None  # None when every post in it was refused
    refused: list[dict[str, str]]  # id, place and reason of each post whose media is missing or corrupt


def done_path(shards_dir: Path, shard: PlannedShard) -> Path:
    """Where the done-record of a shard lies while the build runs."""
    return shards_dir / BUILD_FOLDER / DONE_FOLDER / f"{Path(shard.path).stem}.json"


def read_done(shards_dir: Path, shard: PlannedShard) -> DoneShard | None:
    """The done-record of a shard whose files are there in full, or None when it has to be written."""
    try:
        value = json.loads(done_path(shards_dir, shard).read_bytes())
        info = ShardInfo(**value["info"]) if value["info"] else None
        whole = info is None or (
            (shards_dir / info.path).stat().st_size == info.bytes and (shards_dir / info.index_path).exists()
        )
    except FileNotFoundError:
        return None
    return DoneShard(info, value["refused"]) if whole else None


def write_shard(task: ShardTask) -> DoneShard:
    """Write a shard, its index and then its done-record; a process killed before that leaves it to be written again."""
    build_dir = task.shards_dir / BUILD_FOLDER
    rows = np.array(load_rows(build_dir)[task.shard.start : task.shard.stop])
    target = task.shards_dir / task.shard.path
    with (build_dir / FILE_NAME).open("rb") as spool:
        reader = SampleReader(SpoolReader(spool), task.roots)
        target.parent.mkdir(exist_ok=True)
        with atomic_file(target, build_dir) as file:
            index, sha256 = _write_tar(file, rows, reader)
            size = file.tell()
    info = None
    if len(index):
        encoded = encode_index(index)
        write_atomic(task.shards_dir / task.shard.index_path, encoded, build_dir)
        counts = Counter(index["stratum"].tolist())
        strata = {task.strata[number]: count for number, count in sorted(counts.items())}
        index_sha256 = hashlib.sha256(encoded).hexdigest()
        labels = reader.labels.result()
        info = ShardInfo(task.shard.path, size, len(index), sha256, index_sha256, strata, labels)
    else:
        target.unlink()
    done = DoneShard(info, reader.refused)
    write_atomic(done_path(task.shards_dir, task.shard), canonical_json(asdict(done)))
    return done


def _write_tar(file: BinaryIO, rows: np.ndarray, reader: SampleReader) -> tuple[np.ndarray, str]:
    """Write the samples of `rows` and return their index and the tar's SHA-256."""
    hasher = hashlib.sha256()
    kept, ranges, offset = [], [], 0
    for number, (row, key) in enumerate(zip(rows, hex_keys(rows), strict=True)):
        sample = reader.sample(row, key)
        if sample is None:
            continue
        kept.append(number)
        ranges.append((offset, len(sample), xxhash.xxh3_64_intdigest(sample)))
        file.write(sample)
        hasher.update(sample)
        offset += len(sample)
    file.write(END_OF_TAR)
    hasher.update(END_OF_TAR)
    index = np.zeros(len(kept), dtype=INDEX_DTYPE)
    for name in _COPIED:
        index[name] = rows[name][kept]
    index["text_bytes"] += rows["texts_bytes"][kept]
    located = np.array(ranges, dtype=np.uint64).reshape(-1, 3)
    index["offset"], index["size"], index["digest"] = located.T
    # The tar stays in the order of the keys, a fair mixture for whoever reads it from front to back; the index is by
    # stratum, so that the manifest's counts alone say which rows a stratum has.
    return index[np.argsort(index["stratum"], kind="stable")], hasher.hexdigest()


class SampleReader:
    """Makes the tar members of a post; counts the labels of those it makes, and remembers which posts it refused.

    Args:
        spool: the posts.
        roots: folders that media paths start from.
        decode: whether images, and a part of each clip, are decoded to find damage; needless to see whether bytes are
            those of a shard.
    """

    def __init__(self, spool: SpoolReader, roots: tuple[str, ...], *, decode: bool = True):
        self._spool = spool
        self._image_extension = image_extension if decode else image_kind
        self._decode = decode
        self._roots = [Path(root) for root in roots]
        self.refused: list[dict[str, str]] = []
        self.labels = LabelSums()

    def sample(self, row: Any, key: str) -> bytes | None:
        """All members of a sample, headers and padding included; None if its media cannot be used."""
        content, text, texts, description, place = self._spool.parts(row)
        written = ((TEXTS, texts), ("txt", text))
        members = [_member(f"{key}.json", content), *(_member(f"{key}.{name}", part) for name, part in written if part)]
        if description:
            media = read_description(description)
            try:
                members += [_member(f"{key}.{suffix}", data) for suffix, data in self._media(media)]
            except RefusedMedia as error:
                self.refused.append({"id": media["id"], "place": place.decode(), "reason": str(error)})
                return None
        self.labels.add(json.loads(content))
        return b"".join(members)

    def _media(self, media: dict[str, Any]) -> list[tuple[str, bytes]]:
        """(extension, bytes) of each media item; several images are numbered.

        Raises:
            RefusedMedia: naming the field and the reason.
        """
        root, found = self._roots[media["root"]], []
        images = media["images"]
        for number, item in enumerate(images):
            with _naming("image" if len(images) == 1 else f"images[{number}]", item):
                data = self._bytes(root, item)
                extension = self._image_extension(data)
                found.append((extension if len(images) == 1 else f"{number}.{extension}", data))
        for name, known in (("video", VIDEO_EXTENSIONS), ("audio", AUDIO_EXTENSIONS)):
            if name in media:
                item = media[name]
                with _naming(name, item):
                    data = self._bytes(root, item)
                    extension = clip_extension(data, item if isinstance(item, str) else None, known)
                    if self._decode:
                        check_clip(data, name)
                    found.append((extension, data))
        return found

    def _bytes(self, root: Path, item: str | list[int]) -> bytes:
        return read_file(root / item) if isinstance(item, str) else self._spool.bytes_at(item[0], item[1])


@contextmanager
def _naming(field: str, item: str | list[int]) -> Iterator[None]:
    """Puts the name of a field, and the path that it holds, in front of the reason for a refusal."""
    try:
        yield
    except RefusedMedia as error:
        what = f"{field} '{item}'" if isinstance(item, str) else field
        raise RefusedMedia(f"{what}: {error}") from None


def _member(name: str, data: bytes) -> bytes:
    """A file of a tar: header, content, padding to whole blocks. Without time or owner, so that bytes repeat."""
    header = bytearray(_HEADER)
    header[: len(name)] = name.encode()
    header[SIZE] = b"%011o\0" % len(data)
    header[CHECKSUM] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % tarfile.BLOCKSIZE)

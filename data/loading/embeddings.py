"""Embeddings of posts: what the frozen part of a model says of each, read back from files in place of the posts.

SHARD-00003.DIGEST.safetensors    the 4th block of a shard: `BLOCK_ROWS` of its samples, in their order

A block is named after the hash of its shard's content and the hash of its own: it is found again wherever that shard is
trained on, and whole if its name says so. It is mapped into memory, so that processes of a node share its pages. Of
posts that could not be read it holds nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors.numpy import save

from crossguard.data.loading.encoded import EncodedSample
from crossguard.data.loading.reader import ShardReader
from crossguard.data.shards.files import write_atomic
from crossguard.data.shards.manifest import ShardInfo

BLOCK_ROWS = 4096
# uint64[rows]: what the post was labeled as when it was embedded, by `label_digest`; 0 where there is no embedding.
LABELED = "labeled"
# An array of this name has as many entries for a row as that of the other name says.
VALUES, COUNTS = ".values", ".counts"
# Where the entries of a row start; counted up when a block is mapped.
_STARTS = ".starts"
_NAME = re.compile(r"([0-9a-f]{32})-(\d{5,})\.([0-9a-f]{32})\.safetensors")
# Of safetensors, for numpy.
_DTYPES = {"F32": "<f4", "U16": "<u2", "I32": "<i4", "U64": "<u8", "BOOL": "?"}
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, order=True)
class Block:
    """Samples of a shard that lie side by side."""

    # By `shard_name`, and which of its blocks.
    shard: str
    number: int
    # Where it starts among the rows of the split, and how many it has.
    start: int
    size: int

    @property
    def rows(self) -> np.ndarray:
        """int64[size]: of the split."""
        return np.arange(self.start, self.start + self.size)


def blocks_of(reader: ShardReader) -> list[Block]:
    """All blocks of a split, in the order of its rows."""
    return [
        Block(shard_name(shard), number, int(start) + first, min(BLOCK_ROWS, shard.samples - first))
        for shard, start in zip(reader.shards, reader.starts[:-1], strict=True)
        for number, first in enumerate(range(0, shard.samples, BLOCK_ROWS))
    ]


def shard_name(shard: ShardInfo) -> str:
    """What blocks call a shard: the start of the hash of its tar."""
    return shard.sha256[:32]


def find_blocks(folder: Path) -> dict[tuple[str, int], Path]:
    """(shard, number) -> the file, of all blocks in a folder; of the same block in two forms the first by name."""
    found: dict[tuple[str, int], Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if name := _NAME.fullmatch(path.name):
            found.setdefault((name[1], int(name[2])), path)
    return found


def write_block(folder: Path, block: Block, arrays: Arrays) -> Path:
    """Write a block, which is whole once it has its name."""
    data = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    path = folder / f"{block.shard}-{block.number:05d}.{xxhash.xxh3_128_hexdigest(data)}.safetensors"
    write_atomic(path, data)
    return path


def is_whole(path: Path) -> bool:
    """Whether the content of a block is that which its name says."""
    name = _NAME.fullmatch(path.name)
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return name is not None and digest.hexdigest() == name[3]


def label_digest(id: str, language: str, labels: np.ndarray) -> int:
    """A hash of what is read of a post beside its embedding: it lies in front of the media, apart from which no hash of
    the shard covers it. Never 0."""
    return max(1, xxhash.xxh3_64_intdigest(f"{id}\0{language}\0".encode() + labels.astype("<f4").tobytes()))


class Embeddings:
    """Those of a split, by row.

    Can be sent to other processes: what it has mapped stays behind, and is mapped again where it is used.

    Args:
        blocks: of the split, in the order of its rows.
        files: those of its blocks that there are.
        beside: whether posts are read as well, for what the embeddings leave out.
    """

    def __init__(self, blocks: Iterable[Block], files: Mapping[tuple[str, int], Path], *, beside: bool = False):
        self.beside = beside
        every = list(blocks)
        self.starts = np.array([block.start for block in every])
        self.files = [files.get((block.shard, block.number)) for block in every]
        self._mapped: dict[int, Arrays] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_mapped": {}}

    def has(self, row: int) -> bool:
        """Whether there is an embedding of the row."""
        place = self._place(row)
        return place is not None and bool(place[0][LABELED][place[1]])

    def is_of(self, row: int, sample: EncodedSample) -> bool:
        """Whether the labels of a row that has an embedding are those that it had then."""
        place = self._place(row)
        found = label_digest(sample.id, sample.language, sample.labels)
        return place is not None and int(place[0][LABELED][place[1]]) == found

    def take(self, rows: Iterable[int]) -> Arrays:
        """The embeddings of rows that have one, side by side: [rows, …], and [Σ counts, …] for `.values`."""
        places = [place for row in rows if (place := self._place(row)) is not None]
        return {name: _joined(name, places) for name in _names(places[0][0])}

    def blank(self) -> Arrays:
        """What `take` would give of one row, all zeros."""
        first = next(number for number, file in enumerate(self.files) if file is not None)
        arrays = self._map(first)
        return {
            name: np.zeros((0 if name.endswith(VALUES) else 1, *arrays[name].shape[1:]), dtype=arrays[name].dtype)
            for name in _names(arrays)
        }

    def _place(self, row: int) -> tuple[Arrays, int] | None:
        """The block that a row lies in, if it is there, and the row's number in it."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return None if self.files[number] is None else (self._map(number), row - int(self.starts[number]))

    def _map(self, number: int) -> Arrays:
        if number not in self._mapped:
            path = self.files[number]
            assert path is not None
            arrays = dict(_arrays_in(path))
            for name in [name for name in arrays if name.endswith(COUNTS)]:
                arrays[name + _STARTS] = np.cumsum([0, *arrays[name]])
            self._mapped[number] = arrays
        return self._mapped[number]


def _names(arrays: Arrays) -> list[str]:
    """Of what a model is given."""
    return [name for name in arrays if name != LABELED and not name.endswith(_STARTS)]


def _joined(name: str, places: list[tuple[Arrays, int]]) -> np.ndarray:
    if not name.endswith(VALUES):
        return np.stack([arrays[name][row] for arrays, row in places])
    starts = name.removesuffix(VALUES) + COUNTS + _STARTS
    return np.concatenate([arrays[name][arrays[starts][row] : arrays[starts][row + 1]] for arrays, row in places])


def _arrays_in(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a safetensors file, mapped into memory; its own package would copy them."""
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    data = 8 + int(mapped[:8].view("<u8")[0])
    for name, about in json.loads(mapped[8:data].tobytes()).items():
        first, last = about["data_offsets"]
        array = mapped[data + first : data + last].view(np.ndarray).view(_DTYPES[about["dtype"]])
        yield name, array.reshape(about["shape"])

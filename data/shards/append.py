"""Appending: which posts the shards hold already, and whether they are still what they were.

Appending only adds. A post that is gone or has changed cannot be taken out of shards that stay as they are, so it is an
error, and never a surprise in training.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from crossguard.configs.errors import UserError
from crossguard.configs.progress import progress
from crossguard.data.curation.governance import EXPIRED, RULES
from crossguard.data.shards.executor import Executor
from crossguard.data.shards.files import pread
from crossguard.data.shards.folder import ShardFolder
from crossguard.data.shards.index import INDEX_DTYPE, hex_keys, map_index
from crossguard.data.shards.manifest import Manifest, ShardInfo
from crossguard.data.shards.members import read_header
from crossguard.data.shards.spool import SpoolReader, SpoolWriter
from crossguard.data.shards.storage import LostError
from crossguard.data.shards.writer import SampleReader

_LISTED = 5
_POSTS_A_TASK = 2048


@dataclass(frozen=True, slots=True)
class CompareTask:
    """Some posts and what the shards say of them."""

    start: int  # number of the first one among all that are compared
    spool: Path
    rows: np.ndarray  # spool.row_dtype[n]
    digests: np.ndarray  # uint64[n], of the same posts in the shards
    roots: tuple[str, ...]


def compare(task: CompareTask) -> np.ndarray:
    """bool[n]: whose bytes are not those in the shards, media included."""
    with task.spool.open("rb") as file:
        reader = SampleReader(SpoolReader(file), task.roots, decode=False)
        samples = [reader.sample(row, key) for row, key in zip(task.rows, hex_keys(task.rows), strict=True)]
    found = [sample is not None and xxhash.xxh3_64_intdigest(sample) for sample in samples]
    return np.array(found, dtype=np.uint64) != task.digests


def posts_held(shards_dir: Path, parent: Manifest, spool: SpoolWriter, executor: Executor) -> np.ndarray:
    """bool[posts of the spool]: which of them the shards of `parent` hold.

    A post that has expired since it was written stays where it is: it is not read any more.

    Raises:
        UserError: posts of the shards are gone or have changed; says how many, and names the first ones.
    """
    rows, shards = spool.rows, _Held(shards_dir, parent)
    if not len(shards.rows):
        return np.zeros(len(rows), dtype=bool)
    order = np.argsort(shards.rows["key"], kind="stable")
    where = np.searchsorted(shards.rows["key"], rows["key"], sorter=order)
    # Of a post that is held: its row in the shards; of another: any row.
    entries = np.append(order, 0)[where]
    held = np.isin(rows["key"], shards.rows["key"])

    index = shards.rows[entries]
    expired = rows["left_out"] == 1 + RULES.index(EXPIRED)
    changed = held & (rows["left_out"] > 0) & ~(expired & (rows["expires_at"] == index["expires_at"]))
    present = np.flatnonzero(held & (rows["left_out"] == 0))
    changed[present] = _changed(spool, present, index["digest"][present], executor)
    gone = np.setdiff1d(np.arange(len(shards.rows)), entries[held])
    if changed.any() or len(gone):
        differ = np.flatnonzero(changed)
        named = [f"{spool.place(row)}: {shards.id(entries[row])}: changed" for row in differ[:_LISTED].tolist()]
        named += [f"{shards.shard(row)}: {shards.id(row)}: gone from the posts" for row in gone[:_LISTED].tolist()]
        raise UserError(_message(named, len(differ), len(gone)))
    return held


def _changed(spool: SpoolWriter, numbers: np.ndarray, digests: np.ndarray, executor: Executor) -> np.ndarray:
    """bool[n]: which of the posts with these numbers are not what the shards hold."""
    spool.flush()
    path, roots = spool.path.absolute(), tuple(spool.roots)
    tasks = []
    for start in range(0, len(numbers), _POSTS_A_TASK):
        part = slice(start, start + _POSTS_A_TASK)
        tasks.append(CompareTask(start, path, spool.rows[numbers[part]], digests[part], roots))
    changed = np.zeros(len(numbers), dtype=bool)
    with progress("compare", len(numbers), "posts") as shown:
        for task, result in executor.run(compare, tasks, (path, *map(Path, roots))):
            changed[task.start : task.start + len(result)] = result
            shown.advance(len(result))
    return changed


class _Held:
    """The index rows of a manifest's shards, one shard after the other."""

    def __init__(self, shards_dir: Path, manifest: Manifest):
        self.shards_dir = shards_dir
        self.shards = manifest.shards
        folder = ShardFolder(str(shards_dir), manifest)
        indexes = [_index(folder, shard) for shard in manifest.shards]
        self.rows = np.concatenate([np.zeros(0, INDEX_DTYPE), *indexes])
        self._ends = np.cumsum([len(index) for index in indexes])

    def shard(self, row: int) -> str:
        """The path of the tar that a row's sample lies in."""
        return self.shards[int(np.searchsorted(self._ends, row, side="right"))].path

    def id(self, row: int) -> str:
        """The id of the post of a row, from the tar."""
        offset, size = int(self.rows[row]["offset"]), int(self.rows[row]["size"])
        with (self.shards_dir / self.shard(row)).open("rb") as file:
            sample = pread(file.fileno(), offset, size)
        content = read_header(sample, 0)  # KEY.json comes first
        return str(json.loads(sample[content.start : content.start + content.size])["id"])


def _index(folder: ShardFolder, shard: ShardInfo) -> np.ndarray:
    """The rows of a shard's index; raises UserError when they are not what the manifest says."""
    place = f"{folder.location}/{shard.index_path}"
    try:
        descriptor = folder.open_index(shard, check=True)
    except LostError as error:
        raise UserError(f"{place}: {error}; restore it, or build all anew") from None
    try:
        return map_index(descriptor, place)
    finally:
        os.close(descriptor)


def _message(named: list[str], changed: int, gone: int) -> str:
    counts = [f"{count} {what}" for count, what in ((changed, "changed"), (gone, "gone")) if count]
    more = ["…"] if changed + gone > len(named) else []
    remedy = (
        f"build.append=true only adds, and of the posts in the shards {' and '.join(counts)}; bring them back as they "
        "were, or build all anew with data.shards=NEW_FOLDER"
    )
    return "\n".join([*named, *more, remedy])

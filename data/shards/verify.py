"""Verifying shards: every file against the manifest's hashes, every index row against the tar, bit by bit.

A hash says that a file is damaged; tar and index, each of which follows from the other, say where.
"""

from __future__ import annotations

import json
import mmap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from crossguard.configs.errors import UserError
from crossguard.configs.progress import progress
from crossguard.data.records import epoch_seconds, post_key
from crossguard.data.shards.executor import Processes
from crossguard.data.shards.files import descriptor_sha256
from crossguard.data.shards.folder import has_manifest, read_manifest
from crossguard.data.shards.index import AUDIO, IMAGE, INDEX_DTYPE, TEXT, VIDEO, encode_index, hex_keys, read_index
from crossguard.data.shards.labels import LabelSums
from crossguard.data.shards.manifest import FILE_NAME, Manifest, ShardInfo, version_name
from crossguard.data.shards.media import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from crossguard.data.shards.members import END_OF_TAR, TEXTS, Header, read_header
from crossguard.data.shards.place import Place
from crossguard.data.shards.plan import stratum_of
from crossguard.data.shards.writer import BUILD_FOLDER

_BITS = {"txt": TEXT} | {
    extension: bit
    for extensions, bit in ((IMAGE_EXTENSIONS, IMAGE), (VIDEO_EXTENSIONS, VIDEO), (AUDIO_EXTENSIONS, AUDIO))
    for extension in extensions
}


@dataclass(frozen=True, slots=True, order=True)
class Damage:
    """Something that is not as it was written."""

    file: str  # relative to the shards' folder
    key: str  # of the sample that it lies in, empty where it lies in none
    what: str


@dataclass(frozen=True, slots=True)
class Verified:
    """What was looked at, and what was found."""

    files: int
    samples: int
    damages: tuple[Damage, ...]


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A shard to look at, and what of the manifest its index follows from."""

    place: Place
    shard: ShardInfo
    rarity: tuple[str, ...]
    strata: tuple[str, ...]


def verify(place: Place, num_workers: int) -> Verified:
    """Look at every bit of a set of shards.

    Args:
        place: where they lie.
        num_workers: processes that read shards.

    Raises:
        UserError: there is no manifest at all, or a URL cannot be opened.
        JobError: the storage fails.
    """
    if not has_manifest(place.location):
        read_manifest(place.location)  # says what to do
    versions, damages = _manifests(place)
    if FILE_NAME not in versions:
        return Verified(1, 0, tuple(damages))
    manifest = versions[FILE_NAME]
    listed = {*versions, *(damage.file for damage in damages)}
    listed |= {path for shard in manifest.shards for path in (shard.path, shard.index_path)}
    damages += _unlisted(place, listed)
    tasks = [ShardTask(place, shard, manifest.rarity, manifest.strata) for shard in manifest.shards]
    with progress("verify", len(tasks), "shards") as shown:
        for _, found in Processes(num_workers).run(check_shard, tasks):
            damages += found
            shown.advance()
    if not damages:
        damages += _repeated(place, manifest)
    return Verified(len(listed), sum(manifest.splits.values()), tuple(sorted(damages)))


def _manifests(place: Place) -> tuple[dict[str, Manifest], list[Damage]]:
    """The manifest and the earlier ones that it goes back to, by file, as far as they can be read."""
    found: dict[str, Manifest] = {}
    name, sha256 = FILE_NAME, ""
    while name:
        with place.files(name) as folder:
            there = (folder / name).exists()
            try:
                manifest = Manifest.load(folder, name)
                whole = (folder / name).read_bytes() == manifest.encode() and sha256 in ("", manifest.sha256)
            except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
                whole = False
        if not whole:
            rest = "; nothing else can be checked without it" if name == FILE_NAME else ""
            return found, [Damage(name, "", ("not what was written" if there else "missing") + rest)]
        found[name] = manifest
        sha256 = manifest.parent
        name = version_name(sha256) if sha256 else ""
    return found, []


def _unlisted(place: Place, listed: set[str]) -> list[Damage]:
    strangers = [path for path in place.listing() if Path(path).parts[0] != BUILD_FOLDER and path not in listed]
    found = [Damage(path, "", "no manifest lists it") for path in strangers]
    if (Path(place.location) / BUILD_FOLDER).exists():  # never behind a URL
        found.append(Damage(BUILD_FOLDER, "", "a build is at work or was stopped; start it again to finish it"))
    return found


def _repeated(place: Place, manifest: Manifest) -> list[Damage]:
    """Samples that stand in more than one place."""
    with place.files(*(shard.index_path for shard in manifest.shards)) as folder:
        indexes = [read_index(folder / shard.index_path) for shard in manifest.shards]
    keys, counts = np.unique(np.concatenate([index["key"] for index in indexes]), return_counts=True)
    if not (counts > 1).any():
        return []
    found = []
    for shard, index in zip(manifest.shards, indexes, strict=True):
        again = index[np.isin(index["key"], keys[counts > 1])]
        found += [Damage(shard.index_path, key, "stands in the shards more than once") for key in hex_keys(again)]
    return found


def check_shard(task: ShardTask) -> list[Damage]:
    """Compare a tar and its index with the manifest and with each other."""
    with task.place.files(task.shard.path, task.shard.index_path) as folder:
        return _check_files(task, folder)


def _check_files(task: ShardTask, folder: Path) -> list[Damage]:
    shard = task.shard
    hashes, unreadable = {}, []
    for path in (shard.path, shard.index_path):
        try:
            # By reading: where the storage fails, a map into memory would end the process.
            with (folder / path).open("rb") as file:
                hashes[path] = descriptor_sha256(file.fileno())
        except OSError as error:
            unreadable.append(Damage(path, "", f"cannot be read ({error.strerror})"))
    if unreadable:
        return unreadable
    index = (folder / shard.index_path).read_bytes()
    tar = _mapped(folder / shard.path)
    index_whole = hashes[shard.index_path] == shard.index_sha256
    tar_whole = hashes[shard.path] == shard.sha256 and len(tar) == shard.bytes
    if index_whole and not tar_whole:
        return list(_damaged_samples(shard, tar, np.frombuffer(index, INDEX_DTYPE, offset=_rows_start())))
    if not tar_whole:
        return [Damage(shard.path, "", "damaged"), Damage(shard.index_path, "", "damaged")]
    found = []
    labels = LabelSums()
    expected, wrong = _rows_of(task, tar, labels)
    if wrong:
        found.append(wrong)
    elif encode_index(expected) != index:
        found += _differences(shard, index, encode_index(expected))
    elif Counter({name: n for name, n in shard.strata.items() if n}) != Counter(
        task.strata[number] for number in expected["stratum"].tolist()
    ):
        found.append(Damage(FILE_NAME, "", f"its counts of {shard.path} are not those of the index"))
    elif shard.labels != labels.result():
        found.append(Damage(FILE_NAME, "", f"its counts of labels of {shard.path} are not those of the tar"))
    if not index_whole and not any(damage.file == shard.index_path for damage in found):
        found.append(Damage(shard.index_path, "", "damaged"))
    return found


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        empty = file.seek(0, 2) == 0  # which cannot be mapped
        return memoryview(b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _damaged_samples(shard: ShardInfo, tar: memoryview, rows: np.ndarray) -> Iterator[Damage]:
    """Where a damaged tar differs from an index that is whole."""
    named = False
    for row, key in zip(rows, hex_keys(rows), strict=True):
        start = int(row["offset"])
        if xxhash.xxh3_64_intdigest(tar[start : start + int(row["size"])]) != row["digest"]:
            named = True
            yield Damage(shard.path, key, "its bytes are not those that were written")
    if not named:
        yield Damage(shard.path, "", f"{len(tar)} bytes for {shard.bytes}, or damaged behind its samples")


def _differences(shard: ShardInfo, found: bytes, expected: bytes) -> list[Damage]:
    """Where the bytes of an index differ from those that follow from the tar."""
    start, width = _rows_start(), INDEX_DTYPE.itemsize
    if found[:start] != expected[:start]:
        return [Damage(shard.index_path, "", "its header is damaged")]
    if len(found) != len(expected):
        return [Damage(shard.index_path, "", f"{len(found)} bytes, the tar's samples need {len(expected)}")]
    keys = hex_keys(np.frombuffer(expected, INDEX_DTYPE, offset=start))
    damages = []
    for number, key in enumerate(keys):
        rows = [np.frombuffer(data, INDEX_DTYPE, 1, start + number * width)[0] for data in (found, expected)]
        names = [name for name in INDEX_DTYPE.names or () if rows[0][name] != rows[1][name]]
        if names:
            damages.append(Damage(shard.index_path, key, f"row {number}: {', '.join(names)} is not that of the tar"))
    return damages


def _rows_start() -> int:
    return len(encode_index(np.zeros(0, INDEX_DTYPE)))


def _rows_of(task: ShardTask, tar: memoryview, labels: LabelSums) -> tuple[np.ndarray, Damage | None]:
    """The index that follows from a tar, and what keeps the tar from being a shard; adds up its labels."""
    rows, offset = [], 0
    while offset < len(tar) - len(END_OF_TAR):
        try:
            row, offset = _row_at(task, tar, offset, labels)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            # Only our own errors are sure not to quote the post.
            what = str(error) if type(error) is ValueError else type(error).__name__
            return np.zeros(0, INDEX_DTYPE), Damage(task.shard.path, "", f"the sample at byte {offset}: {what}")
        rows.append(row)
    if tar[offset:] != END_OF_TAR:
        return np.zeros(0, INDEX_DTYPE), Damage(task.shard.path, "", "does not end as a tar does")
    index = np.array(rows, dtype=INDEX_DTYPE)
    return index[np.lexsort((index["key"], index["stratum"]))], None


def _row_at(task: ShardTask, tar: memoryview, offset: int, labels: LabelSums) -> tuple[tuple[int | bytes, ...], int]:
    """The index row of the sample at `offset`, and where the next one starts.

    Raises:
        ValueError: there is no sample of a shard there.
    """
    header = read_header(tar, offset)
    key = header.name.partition(b".")[0]
    post = json.loads(bytes(tar[header.start : header.start + header.size]))
    if header.name != key + b".json" or post_key(post["id"]).hex().encode() != key:
        raise ValueError("not the fields of a post under its key")
    if post["split"] != task.shard.split:
        raise ValueError("a post of another split")
    text_bytes = modalities = 0
    end = header.end
    for member in _members(tar, end, key):
        name = member.name[len(key) + 1 :].decode()
        bit = TEXT if name == TEXTS else _BITS.get(name.rpartition(".")[2], 0)
        if not bit or member.type != b"0":
            raise ValueError("a member that no shard has")
        modalities |= bit
        text_bytes += member.size if bit == TEXT else 0
        end = member.end
    expires_at = epoch_seconds(post["expires_at"]) if "expires_at" in post else 0
    stratum = task.strata.index(stratum_of(post["language"], post["labels"], task.rarity))
    labels.add(post)
    digest = xxhash.xxh3_64_intdigest(tar[offset:end])
    values: dict[str, int | bytes] = {
        "key": bytes.fromhex(key.decode()),
        "offset": offset,
        "size": end - offset,
        "digest": digest,
        "expires_at": expires_at,
        "stratum": stratum,
        "text_bytes": text_bytes,
        "modalities": modalities,
    }
    return tuple(values[name] for name in INDEX_DTYPE.names or ()), end


def _members(tar: memoryview, offset: int, key: bytes) -> Iterator[Header]:
    """The further members of a sample."""
    while offset < len(tar) - len(END_OF_TAR):
        member = read_header(tar, offset)
        if not member.name.startswith(key + b".") or member.name == key + b".json":
            return
        yield member
        offset = member.end

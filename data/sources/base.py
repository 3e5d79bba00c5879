"""What a source is: it yields raw records and has a fingerprint. A new source is one file with one class."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import xxhash

from crossguard.configs.errors import UserError
from crossguard.configs.schema.data import DataConfig
from crossguard.configs.suggest import did_you_mean
from crossguard.data.records import MEDIA_FIELDS

_READ_WHOLE = 256 << 10
_SAMPLED = 64 << 10


class Record(NamedTuple):
    """One raw record, or why it could not be read."""

    place: str  # for messages: "posts.jsonl:17"
    raw: dict[str, Any] | None  # the contract's JSON shape; media are paths or bytes
    error: str | None = None  # "field: what is wrong", when there is no raw record
    media_root: Path | None = None  # the folder that media paths start from


class Source(Protocol):
    """Constructed with `(config: DataConfig, taxonomy: Taxonomy, seed: int)`."""

    def records(self) -> Iterator[Record]:
        """Every record, in any order; can be called again."""
        ...

    def fingerprint(self) -> str:
        """A hash of what will be read: the same for the same posts, wherever they lie and in whatever order."""
        ...


def needed_path(config: DataConfig) -> Path:
    """`data.path`, which must exist.

    Raises:
        UserError: it is not set or does not exist.
    """
    if not config.path:
        raise UserError("data.path: not set; write data.path=FILE_OR_FOLDER of posts")
    path = Path(config.path)
    if not path.exists():
        raise UserError(f"data.path={config.path}: no such file or folder")
    return path


def files_of(config: DataConfig, suffixes: tuple[str, ...]) -> list[Path]:
    """The file that `data.path` names, or the files with one of `suffixes` in the folder that it names.

    Raises:
        UserError: nothing is there.
    """
    path = needed_path(config)
    if path.is_file():
        return [path]
    files = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in suffixes and entry.is_file())
    if not files:
        raise UserError(f"data.path={config.path}: the folder holds no {' or '.join(suffixes)} file")
    return files


def check_settings(config: DataConfig, *, options: tuple[str, ...] = (), keys: tuple[str, ...] = ()) -> None:
    """Refuse options of a source that it does not have, and settings that it would not look at.

    Args:
        config: the data settings.
        options: valid names under `data.options`.
        keys: which of `columns` and `media_dir` the source reads.

    Raises:
        UserError: naming the nearest valid option.
    """
    for name in config.options:
        if name not in options:
            hint = did_you_mean(name, options)
            raise UserError(f"data.options.{name}: unknown option of data.source={config.source}; {hint}")
    for key in ("columns", "media_dir"):
        if getattr(config, key) and key not in keys:
            raise UserError(f"data.{key}: data.source={config.source} does not read it; remove it")


def media_stamp(root: Path | None, path: str) -> bytes:
    """A media file as a fingerprint sees it: relative path, size, and a hash of its bytes.

    Files of up to 256 KiB are read whole, which costs little more than asking for their size. Of larger ones the first,
    middle and last 64 KiB are read: that notices every replacement, but not a few bytes that change in between. All of
    them would make asking whether anything has changed as dear as building.
    """
    size, content = -1, b""
    try:
        # Or opening a named pipe would wait for a writer.
        with open(os.open((root or Path()) / path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", 0) as file:
            size = os.fstat(file.fileno()).st_size
            if size <= _READ_WHOLE:
                content = file.read(_READ_WHOLE)
            else:
                starts = (0, (size - _SAMPLED) // 2, size - _SAMPLED)
                content = b"".join(os.pread(file.fileno(), _SAMPLED, start) for start in starts)
    except (OSError, ValueError):  # missing or unreadable, which the build says
        pass
    return f"{path}\0{size}\0{xxhash.xxh3_128_hexdigest(content)}\n".encode(errors="surrogatepass")


class Fingerprint:
    """A hash of records that does not depend on their order: the sum of their own hashes."""

    def __init__(self) -> None:
        self._sum = 0

    def add(self, content: bytes) -> None:
        """One more record."""
        self._sum += int.from_bytes(hashlib.blake2b(content, digest_size=16).digest(), "little")

    def hexdigest(self) -> str:
        """The fingerprint of what was added, in hex."""
        return hashlib.blake2b(str(self._sum).encode(), digest_size=16).hexdigest()


def fingerprint_records(records: Iterable[Record]) -> str:
    """The fingerprint of any source, from its records."""
    fingerprint = Fingerprint()
    for _, raw, error, media_root in records:
        plain = dict(raw or {})
        parts = []
        for name in MEDIA_FIELDS:
            items = plain.pop(name, None)
            for item in items if isinstance(items, list | tuple) else [items]:
                content = item if isinstance(item, bytes) else media_stamp(media_root, str(item))
                parts.append(hashlib.blake2b(content, digest_size=16).digest())
        rest = json.dumps([plain, error], sort_keys=True, default=repr)
        fingerprint.add(b"".join(parts) + rest.encode())
    return fingerprint.hexdigest()

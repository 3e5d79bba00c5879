"""Posts in existing WebDataset tars: our own shards, or those of another tool (webdataset, img2dataset).

A sample is a run of members with the same key. Its fields are those of KEY.json and KEY.texts.json, and every other
member under its extension: text (txt) and media are taken by default, `caption.txt` is a text of its own and
`meta.json` an object.
`data.columns` names the fields of a foreign sample, e.g. {labels.hate: cls, text: caption.txt}; a dotted name leads
into objects, e.g. {labels.spam: annotations.spam, meta.url: meta.json.url}. A post without `id` is called by its key.
Pickled members are never opened. What lies beside the tars (img2dataset's parquet and statistics) is not read.
"""

from __future__ import annotations

import gzip
import json
import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crossguard.configs.errors import UserError
from crossguard.configs.schema.data import DataConfig
from crossguard.configs.suggest import did_you_mean
from crossguard.data.records import FIELDS
from crossguard.data.shards.media import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from crossguard.data.shards.members import TEXTS, walk
from crossguard.data.sources.base import Record, check_settings, fingerprint_records, needed_path
from crossguard.data.sources.columns import Columns
from crossguard.data.taxonomy import Taxonomy

_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_GZIP = b"\x1f\x8b"
# webdataset's own rule: the key ends at the first dot of the file's name.
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
# One image of a sample (jpg) or one of several (0.jpg); others, such as mask.png, are fields of their own.
_IMAGE = re.compile(rf"(\d+\.)?({'|'.join(sorted(IMAGE_EXTENSIONS))})")
_ABSENT = object()
_PICKLED = frozenset(("pyd", "pickle", "pkl", "pth", "pt"))


class WebDatasetSource:
    """Reads the tars of a folder (and of the folders in it), or a single one."""

    def __init__(self, config: DataConfig, taxonomy: Taxonomy, seed: int):
        """
        Raises:
            UserError: no such file or folder, or a mapping of what is no field.
        """
        check_settings(config, keys=("columns",))
        path = needed_path(config)
        self.root = path if path.is_dir() else path.parent
        self.files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.name.endswith(_SUFFIXES))
        if not self.files:
            raise UserError(f"data.path={config.path}: the folder holds no .tar file")
        self.columns = Columns(config.columns, taxonomy)
        self.mapped = dict(config.columns)

    def records(self) -> Iterator[Record]:
        """Every sample; its place is `<tar>:<key>`.

        Raises:
            UserError: `data.columns` names what no sample has.
        """
        seen: set[str] = set()
        for path in self.files:
            name = path.relative_to(self.root).as_posix()
            try:
                for key, sample in _samples(_open(path)):
                    yield self._record(f"{name}:{key}", key, sample, seen)
            except (ValueError, OSError, EOFError) as error:
                what = str(error) if type(error) is ValueError else type(error).__name__
                yield Record(name, None, f"tar: cannot be read to its end ({what})")
        for field, column in self.mapped.items():
            if seen and column not in seen:
                hint = did_you_mean(column, seen)
                raise UserError(f"data.columns.{field}={column}: no sample has it; {hint}")

    def fingerprint(self) -> str:
        """Hash of the samples, whatever tars they lie in."""
        return fingerprint_records(self.records())

    def _record(self, place: str, key: str, sample: dict[str, bytes], seen: set[str]) -> Record:
        """The record of a sample; adds the names that it has to `seen`."""
        pickled = sorted(_PICKLED.intersection(map(_last, sample)))
        if pickled:
            return Record(place, None, f"{pickled[0]}: may hold pickled objects, which are never opened; remove it")
        try:
            fields = _fields(sample)
        except ValueError as error:
            return Record(place, None, str(error))
        seen.update(fields)
        if self.mapped:
            names = {*fields.keys() & FIELDS, *self.mapped.values()}
            row = {name: value for name in names if (value := _value(fields, name)) is not _ABSENT}
            seen.update(row)
            fields = self.columns.read(row, self.columns.targets(names, place))
        elif unread := sorted(fields.keys() - FIELDS):
            what = f"{unread[0]}: no field of a post; say in data.columns what to read, as field: name"
            return Record(place, None, what)
        fields.setdefault("id", key)
        return Record(place, fields)


def _open(path: Path) -> bytes | memoryview:
    """The bytes of a tar, mapped into memory; those of a compressed one in it."""
    with path.open("rb") as file:
        magic = file.read(2)
        if not magic:
            raise ValueError("empty")
        if magic == _GZIP:
            return gzip.decompress(path.read_bytes())
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _samples(tar: bytes | memoryview) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Runs of members with the same key, as extension -> content; empty where the content is never opened.

    Raises:
        ValueError: the tar is damaged.
    """
    current: str | None = None
    sample: dict[str, bytes] = {}
    for member in walk(tar):
        match = _MEMBER.fullmatch(member.name.decode())
        if match is None:
            continue
        key, suffix = match[1], match[2].lower()
        if key != current:
            if current is not None:
                yield current, sample
            current, sample = key, {}
        opened = _last(suffix) not in _PICKLED
        sample[suffix] = bytes(tar[member.start : member.start + member.size]) if opened else b""
    if current is not None:
        yield current, sample


def _last(suffix: str) -> str:
    return suffix.rpartition(".")[2]


def _fields(sample: dict[str, bytes]) -> dict[str, Any]:
    """The fields of a sample, images in the order of the tar.

    Raises:
        ValueError: "member: what is wrong".
    """
    fields: dict[str, Any] = {}
    images: list[bytes] = []
    for suffix, content in sample.items():
        last = _last(suffix)
        if suffix in ("json", TEXTS):
            fields.update(_object(content))
        elif suffix in VIDEO_EXTENSIONS:
            fields["video"] = content
        elif suffix in AUDIO_EXTENSIONS:
            fields["audio"] = content
        elif _IMAGE.fullmatch(suffix):
            images.append(content)
        elif last in ("txt", "text"):
            fields["text" if suffix == last else suffix] = _text(suffix, content)
        elif last == "json":
            fields[suffix] = _json(suffix, content)
        elif last in ("cls", "index"):
            fields[suffix] = _number(suffix, content)
        else:
            fields[suffix] = content
    if images:
        fields["images"] = images
    return fields


def _value(fields: Mapping[str, Any], name: str) -> Any:
    """The field of a name, or what a dotted name leads to; `_ABSENT` where there is nothing."""
    if name in fields:
        return fields[name]
    # Names may hold dots themselves: meta.json.url is the url of meta.json.
    for end in range(len(name) - 1, 0, -1):
        if name[end] == "." and isinstance(fields.get(name[:end]), Mapping):
            return _value(fields[name[:end]], name[end + 1 :])
    return _ABSENT


def _object(content: bytes) -> dict[str, Any]:
    value = _json("json", content)
    if not isinstance(value, dict):
        raise ValueError("json: must be a JSON object")
    return value


def _json(suffix: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError(f"{suffix}: not valid JSON") from None


def _text(suffix: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{suffix}: not valid UTF-8 text") from None


def _number(suffix: str, content: bytes) -> int:
    try:
        return int(content)
    except ValueError:
        raise ValueError(f"{suffix}: must be a whole number") from None

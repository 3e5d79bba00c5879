"""Posts in existing WebDataset tars: our own shards, or those of another tool (webdataset, img2dataset).

A sample is a run of members with the same key. Its fields are those of KEY.json, and every other member under its
extension; of these, text (txt) and media are taken by default. `data.columns` names the fields of a foreign sample,
e.g. {labels.hate: cls, meta.url: url}. A post without `id` is called by its key. Pickled members are never opened.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from typing import Any

from crossguard.configs.errors import UserError
from crossguard.configs.schema.data import DataConfig
from crossguard.configs.suggest import did_you_mean
from crossguard.data.records import FIELDS
from crossguard.data.shards.media import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from crossguard.data.sources.base import Record, check_settings, fingerprint_records, needed_path
from crossguard.data.sources.columns import Columns
from crossguard.data.taxonomy import Taxonomy

# webdataset's own rule: the key ends at the first dot of the file's name.
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
# One image of a sample (jpg) or one of several (0.jpg); others, such as mask.png, are fields of their own.
_IMAGE = re.compile(rf"(\d+\.)?({'|'.join(sorted(IMAGE_EXTENSIONS))})")
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
        self.files = [path] if path.is_file() else sorted(path.rglob("*.tar"))
        if not self.files:
            raise UserError(f"data.path={config.path}: the folder holds no .tar file")
        self.columns = Columns(config.columns, taxonomy)
        self.mapped = dict(config.columns)

    def records(self) -> Iterator[Record]:
        """Every sample; its place is `<tar>:<key>`.

        Raises:
            UserError: at the end, when `data.columns` named a field that no sample has.
        """
        self.seen: set[str] = set()
        for path in self.files:
            name = path.relative_to(self.root).as_posix()
            try:
                with tarfile.open(path, mode="r|*") as tar:
                    for key, sample in _samples(tar):
                        yield self._record(f"{name}:{key}", key, sample)
            except (tarfile.TarError, OSError, EOFError) as error:
                yield Record(name, None, f"tar: cannot be read to its end ({type(error).__name__})")
        for field, column in self.mapped.items():
            if self.seen and column not in self.seen:
                hint = did_you_mean(column, self.seen)
                raise UserError(f"data.columns.{field}={column}: no sample has such a field; {hint}")

    def fingerprint(self) -> str:
        """Hash of the samples, whatever tars they lie in."""
        return fingerprint_records(self.records())

    def _record(self, place: str, key: str, sample: dict[str, bytes]) -> Record:
        pickled = sorted(_PICKLED.intersection(map(_last, sample)))
        if pickled:
            return Record(place, None, f"{pickled[0]}: may hold pickled objects, which are never opened; remove it")
        try:
            fields = _fields(sample)
        except ValueError as error:
            return Record(place, None, str(error))
        self.seen |= fields.keys()
        if self.mapped:
            names = {field for field in fields if field in FIELDS} | set(self.mapped.values())
            fields = self.columns.read(fields, self.columns.targets(sorted(names), place))
        fields.setdefault("id", key)
        return Record(place, fields)


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Runs of members with the same key, as extension -> content; empty where the content is never opened."""
    current: str | None = None
    sample: dict[str, bytes] = {}
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # the library would keep every header of a large tar
        match = _MEMBER.fullmatch(member.name)
        if not member.isreg() or match is None:
            continue
        key, suffix = match[1], match[2].lower()
        if key != current:
            if current is not None:
                yield current, sample
            current, sample = key, {}
        file = None if _last(suffix) in _PICKLED else tar.extractfile(member)
        sample[suffix] = file.read() if file else b""
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
        if suffix == "json":
            fields.update(_json(content))
        elif suffix in ("txt", "text"):
            fields["text"] = _text(suffix, content)
        elif suffix in VIDEO_EXTENSIONS:
            fields["video"] = content
        elif suffix in AUDIO_EXTENSIONS:
            fields["audio"] = content
        elif _IMAGE.fullmatch(suffix):
            images.append(content)
        elif suffix in ("cls", "index"):
            fields[suffix] = _number(suffix, content)
        else:
            fields[suffix] = content
    if images:
        fields["images"] = images
    return fields


def _json(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("json: not valid JSON") from None
    if not isinstance(value, dict):
        raise ValueError("json: must be a JSON object")
    return value


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

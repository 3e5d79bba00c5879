"""Posts as JSON lines: a file, or a folder of `.jsonl` files; media paths start from the file's folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from crossguard.configs.schema.data import DataConfig
from crossguard.data.records import MEDIA_FIELDS
from crossguard.data.sources.base import Fingerprint, Record, check_settings, files_of, media_stamp
from crossguard.data.taxonomy import Taxonomy

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A line that matches no media key needs no parsing for its fingerprint.
_MAY_HOLD_MEDIA = re.compile(rb'"(image|images|video|audio)"\s*:\s*["\[]')


class JsonLinesSource:
    """Reads the contract's JSON lines as they are."""

    def __init__(self, config: DataConfig, taxonomy: Taxonomy, seed: int):
        """
        Raises:
            UserError: no such file, or settings that only other sources read.
        """
        check_settings(config)
        self.files = files_of(config, (".jsonl",))

    def records(self) -> Iterator[Record]:
        """Every line that is not blank."""
        for path in self.files:
            root = path.parent
            for number, line in _lines(path):
                raw, error = _parse(line)
                yield Record(f"{path.name}:{number}", raw, error, root)

    def fingerprint(self) -> str:
        """Content of the lines, and a stamp of each media file that they name."""
        fingerprint = Fingerprint()
        for path in self.files:
            for _, line in _lines(path):
                fingerprint.add(line.strip() + _media_stamps(path, line))
        return fingerprint.hexdigest()


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if not line.isspace():
                yield number, line


def _parse(line: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """The object on a line, or what is wrong with it."""
    try:
        raw = _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        return None, f"line: not valid UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        return None, f"line: not valid JSON ({error.msg} at character {error.pos})"
    except (ValueError, RecursionError) as error:
        return None, f"line: {error}"
    if not isinstance(raw, dict):
        return None, "line: must be a JSON object"
    return raw, None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object names the same key twice")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON; write null for unknown")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)


def _media_stamps(path: Path, line: bytes) -> bytes:
    raw = _parse(line)[0] if _MAY_HOLD_MEDIA.search(line) else None
    stamps = []
    for name in MEDIA_FIELDS:
        items = (raw or {}).get(name)
        listed = items if isinstance(items, list) else [items]
        stamps += [media_stamp(path.parent, item) for item in listed if isinstance(item, str)]
    return b"".join(stamps)

"""The manifest inside a checkpoint: every file with its size and BLAKE3 hash, and a hash of itself.

DeepSpeed's own checkpoints have none: one flipped bit in them loads without a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from crossguard.configs.errors import UserError
from crossguard.data.shards.files import write_atomic

FORMAT = 3
MANIFEST = "manifest.json"
# A file's size and hash.
Entry = dict[str, Any]
# The files that each rank writes, which may be large: fragments-00000.safetensors.
_OF_A_RANK = re.compile(r"-\d{5,}\.\w+")


class DamagedCheckpoint(UserError):
    """A file of a checkpoint is missing, truncated or altered; the message names it."""


def entry(content: bytes) -> Entry:
    """What the manifest says of a file with this content."""
    return {"size": len(content), "blake3": blake3(content).hexdigest()}


def write_manifest(checkpoint: Path, files: Mapping[str, Entry], *, best: bool) -> None:
    """List every other file; `best` marks a state whose evaluation was the best so far."""
    write_atomic(checkpoint / MANIFEST, _encode({"format": FORMAT, "best": best, "files": dict(files)}))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest: format, best, files.

    Raises:
        DamagedCheckpoint: it is missing or altered.
        UserError: another version of crossguard wrote it.
    """
    file = checkpoint / MANIFEST
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"{file}: unreadable ({error.strerror})") from None
    return parse_manifest(content, str(file))


def parse_manifest(content: bytes, place: str) -> dict[str, Any]:
    """The manifest in these bytes, which were read at `place`; raises as `read_manifest`."""
    try:
        manifest: dict[str, Any] = json.loads(content)
        stated = manifest.pop("blake3", None)
    except (ValueError, AttributeError, TypeError):
        raise DamagedCheckpoint(f"{place}: altered, it is no JSON any more") from None
    whole = content == _encode(manifest)
    if manifest.get("format") != FORMAT and (whole or stated is None):
        raise UserError(f"{place}: format {manifest.get('format')}, this version of crossguard reads {FORMAT}")
    if not whole:
        raise DamagedCheckpoint(f"{place}: altered, its content has another hash")
    return manifest


def verify(checkpoint: Path, rank: int = 0, world_size: int = 1) -> None:
    """Compare the files with the manifest; each of `world_size` ranks takes its share of them.

    Raises:
        DamagedCheckpoint: names the first file that is missing, truncated or altered.
        UserError: another version of crossguard wrote it.
    """
    files = read_manifest(checkpoint)["files"]
    for name in sorted(files)[rank::world_size]:
        _check_size(checkpoint / name, files[name])
        _check_content(checkpoint / name, files[name])


def is_intact(checkpoint: Path) -> bool:
    """What can be seen in milliseconds: manifest, sizes, and the content of all but the files of single ranks.

    A checkpoint of another version counts as intact: whoever reads it says so.
    """
    try:
        for name, stated in read_manifest(checkpoint)["files"].items():
            _check_size(checkpoint / name, stated)
            if not _OF_A_RANK.search(name):
                _check_content(checkpoint / name, stated)
    except DamagedCheckpoint:
        return False
    except UserError:
        return True
    return True


def fragment_files(checkpoint: Path) -> Iterator[Path]:
    """The files that hold tensors."""
    return (checkpoint / name for name in read_manifest(checkpoint)["files"] if name.endswith(".safetensors"))


def _encode(manifest: dict[str, Any]) -> bytes:
    """The one way to write a manifest, with its own hash last: what differs from this by a bit is altered."""
    hashed = blake3(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "blake3": hashed}, indent=1, sort_keys=True).encode()


def _check_size(file: Path, stated: Entry) -> None:
    if not file.is_file():
        raise DamagedCheckpoint(f"{file}: missing")
    if (size := file.stat().st_size) != stated["size"]:
        raise DamagedCheckpoint(f"{file}: {size} bytes, the manifest says {stated['size']}")


def _check_content(file: Path, stated: Entry) -> None:
    try:
        found = _digest(file)
    except OSError as error:  # A disk that cannot read it back.
        raise DamagedCheckpoint(f"{file}: unreadable ({error.strerror})") from None
    if found != stated["blake3"]:
        raise DamagedCheckpoint(f"{file}: altered, its content has another hash than in the manifest")


def _digest(file: Path) -> str:
    """BLAKE3 of a file, 256 bits in hex."""
    hasher = blake3()
    with file.open("rb") as opened:
        while block := opened.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()

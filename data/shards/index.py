"""The index beside each tar: one fixed-width row a sample, little-endian, behind a header with magic and version.

A sample is one contiguous range of bytes of the tar: all its members, headers and padding included. The rows are sorted
by stratum, then by key, whatever the order of the samples in the tar.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

import numpy as np

from crossguard.configs.errors import UserError

MAGIC = b"CGINDEX\n"
VERSION = 2
_HEADER = struct.Struct("<8sII")  # magic, version, bytes of a row

# Bits of `modalities`.
TEXT, IMAGE, VIDEO, AUDIO = 1, 2, 4, 8

INDEX_DTYPE = np.dtype(
    [
        ("key", "S16"),  # records.post_key of the id
        ("offset", "<u8"),  # where the sample starts in the tar
        ("size", "<u8"),  # its bytes
        ("digest", "<u8"),  # xxh3_64 of those bytes
        ("expires_at", "<i8"),  # seconds since 1970, 0 for never
        ("stratum", "<u4"),  # index into the manifest's strata
        ("text_bytes", "<u4"),  # UTF-8 bytes of all that is written in the post
        ("modalities", "<u2"),  # TEXT | IMAGE | VIDEO | AUDIO
    ]
)


def encode_index(rows: np.ndarray) -> bytes:
    """The file's bytes for rows of `INDEX_DTYPE`."""
    return _HEADER.pack(MAGIC, VERSION, INDEX_DTYPE.itemsize) + rows.astype(INDEX_DTYPE).tobytes()


def index_bytes(samples: int) -> int:
    """Size of the file for so many samples."""
    return _HEADER.size + samples * INDEX_DTYPE.itemsize


def read_index(path: Path) -> np.ndarray:
    """The rows of an index file, mapped into memory, read-only.

    Raises:
        OSError: the file is missing or cannot be read.
        UserError: it is no index, is cut short, or was written by another version.
    """
    with path.open("rb") as file:
        return map_index(file.fileno(), str(path))


def map_index(descriptor: int, path: str) -> np.ndarray:
    """The rows of an open index file, which may be closed then; `path` names it in errors. Raises as `read_index`."""
    header = os.pread(descriptor, _HEADER.size, 0)
    if len(header) < _HEADER.size or header[: len(MAGIC)] != MAGIC:
        raise UserError(f"{path}: not an index of shards; remove the folder and build again")
    _, version, width = _HEADER.unpack(header)
    if version != VERSION or width != INDEX_DTYPE.itemsize:
        raise UserError(
            f"{path}: index of version {version}, this crossguard reads {VERSION}; remove the folder and build again"
        )
    mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    if (len(mapped) - _HEADER.size) % width:
        raise UserError(f"{path}: cut short; remove the folder and build again")
    return np.frombuffer(mapped, dtype=INDEX_DTYPE, offset=_HEADER.size)


def hex_keys(rows: np.ndarray) -> list[str]:
    """The KEYs of rows, as they name members of the tar. (numpy drops the trailing zero bytes of single values.)"""
    packed = np.ascontiguousarray(rows["key"]).tobytes().hex()
    return [packed[start : start + 32] for start in range(0, len(packed), 32)]

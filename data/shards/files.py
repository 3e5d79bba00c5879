"""Writing files so that a process killed at any moment leaves each one whole or absent."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: Path, staging: Path | None = None) -> Iterator[BinaryIO]:
    """A file that appears at `path` when the block ends, flushed to the disk; nothing appears if the block fails.

    Args:
        path: where the file belongs.
        staging: folder on the same file system for the temporary file; by default the file's own.
    """
    temporary = (staging or path.parent) / f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_atomic(path: Path, data: bytes, staging: Path | None = None) -> None:
    """Write a whole file by `atomic_file`."""
    with atomic_file(path, staging) as file:
        file.write(data)


def pread(descriptor: int, offset: int, size: int) -> bytes:
    """A range of an open file, or less where the file ends."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size:  # One call returns at most 2 GiB.
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def descriptor_sha256(descriptor: int) -> str:
    """SHA-256 of an open file's whole content, in hex."""
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make a file's content, or the renames inside a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

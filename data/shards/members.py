"""The headers of tar members, read from a buffer: several times faster than `tarfile`."""

from __future__ import annotations

from typing import NamedTuple

BLOCK = 512
_NAME, _SIZE, _CHECKSUM, _TYPE, _MAGIC, _PREFIX = (
    slice(0, 100),
    slice(124, 136),
    slice(148, 156),
    slice(156, 157),
    slice(257, 263),
    slice(345, 500),
)
_SPACES = 8 * ord(" ")


class Header(NamedTuple):
    """A member: what its header says, and where its content lies."""

    name: bytes
    type: bytes  # b"0" for a file
    start: int  # of the content in the buffer
    size: int  # of the content

    @property
    def end(self) -> int:
        """Where the next header starts: contents fill whole blocks."""
        return self.start + -(-self.size // BLOCK) * BLOCK


def read_header(data: bytes | memoryview, offset: int) -> Header:
    """The header at `offset` (POSIX.1-1988 ustar, with GNU's binary sizes).

    Raises:
        ValueError: it is cut short, or its checksum is not its own.
    """
    block = bytes(data[offset : offset + BLOCK])
    if len(block) < BLOCK:
        raise ValueError("cut short")
    if sum(block) - sum(block[_CHECKSUM]) + _SPACES != int(block[_CHECKSUM].rstrip(b"\0 ") or b"0", 8):
        raise ValueError("a header whose checksum is wrong")
    name = block[_NAME].partition(b"\0")[0]
    if block[_MAGIC] == b"ustar\0" and block[_PREFIX][0]:
        name = block[_PREFIX].partition(b"\0")[0] + b"/" + name
    # From 8 GiB on, GNU tar writes a size as a binary number with the highest bit set.
    binary = block[_SIZE][0] & 0x80
    size = int.from_bytes(block[_SIZE][1:], "big") if binary else int(block[_SIZE].rstrip(b"\0 ") or b"0", 8)
    kind = block[_TYPE]
    return Header(name, b"0" if kind == b"\0" else kind, offset + BLOCK, size)

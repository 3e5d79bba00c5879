"""The headers of tar members, read from a buffer: several times faster than `tarfile`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

# The extension of what is written in a post beside its caption.
TEXTS = "texts.json"
BLOCK = 512
END_OF_TAR = bytes(2 * BLOCK)
NAME, SIZE, CHECKSUM, TYPE, _MAGIC, _PREFIX = (
    slice(0, 100),
    slice(124, 136),
    slice(148, 156),
    slice(156, 157),
    slice(257, 263),
    slice(345, 500),
)
_SPACES = 8 * ord(" ")
_END = bytes(BLOCK)
_FILES = (b"0", b"7")
_DESCRIPTIONS = (b"g", b"K")  # global headers and long names of links: nothing here follows from them


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
    if sum(block) - sum(block[CHECKSUM]) + _SPACES != int(block[CHECKSUM].rstrip(b"\0 ") or b"0", 8):
        raise ValueError("a header whose checksum is wrong")
    name = block[NAME].partition(b"\0")[0]
    if block[_MAGIC] == b"ustar\0" and block[_PREFIX][0]:
        name = block[_PREFIX].partition(b"\0")[0] + b"/" + name
    # From 8 GiB on, GNU tar writes a size as a binary number with the highest bit set.
    binary = block[SIZE][0] & 0x80
    size = int.from_bytes(block[SIZE][1:], "big") if binary else int(block[SIZE].rstrip(b"\0 ") or b"0", 8)
    kind = block[TYPE]
    return Header(name, b"0" if kind == b"\0" else kind, offset + BLOCK, size)


def walk(data: bytes | memoryview) -> Iterator[Header]:
    """Every file of a tar of any origin: ustar, GNU (long names) or pax (extended headers).

    Raises:
        ValueError: the tar is damaged, cut short, or holds sparse files; says at which byte.
    """
    offset, extended = 0, dict[bytes, bytes]()
    while bytes(data[offset : offset + BLOCK]) != _END:
        try:
            header = read_header(data, offset)
            if header.type == b"x":
                extended |= _pax(_content(data, header))
            elif header.type == b"L":
                extended[b"path"] = _content(data, header).rstrip(b"\0")
            elif header.type in _DESCRIPTIONS:
                _content(data, header)
            else:
                size = int(extended.get(b"size", header.size))
                header = header._replace(name=extended.get(b"path", header.name), size=size)
                extended = {}
                if header.type in _FILES:
                    if header.start + size > len(data):
                        raise ValueError("cut short")
                    yield header
        except ValueError as error:
            what = str(error) if type(error) is ValueError else "a header that makes no sense"
            raise ValueError(f"{what} at byte {offset}") from None
        offset = header.end


def _content(data: bytes | memoryview, header: Header) -> bytes:
    content = bytes(data[header.start : header.start + header.size])
    if len(content) < header.size:
        raise ValueError("cut short")
    return content


def _pax(content: bytes) -> dict[bytes, bytes]:
    """The records of an extended header, each "<bytes of it> <name>=<value>\\n"."""
    records, start = {}, 0
    while start < len(content):
        length = int(content[start:].partition(b" ")[0])
        if length <= 0:
            raise ValueError("an extended header that makes no sense")
        name, _, value = content[start : start + length].partition(b" ")[2].partition(b"=")
        records[name] = value.removesuffix(b"\n")
        start += length
    return records

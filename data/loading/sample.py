"""A post as it lies in a shard, taken from the bytes of its members."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from crossguard.data.shards.media import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from crossguard.data.shards.members import BLOCK, NAME, SIZE, TEXTS, TYPE

HEAD = ("json", "txt", TEXTS)


@dataclass(frozen=True, slots=True)
class RawSample:
    """A post as it lies in a shard: its fields and the bytes of its media."""

    # The post's fields but text and media (KEY.json).
    post: dict[str, Any]
    # The caption.
    text: str | None = None
    # The files' bytes, in the order of the post.
    images: list[bytes] = field(default_factory=list)
    video: bytes | None = None
    audio: bytes | None = None
    # What else is written in the post: ocr, transcript (strings) and comments (a list of them), as far as there are any
    # (KEY.texts.json).
    texts: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The post's id."""
        return str(self.post["id"])

    @property
    def language(self) -> str:
        """Language code; "und" when none was given."""
        return str(self.post.get("language") or "und")

    @property
    def written(self) -> str:
        """All that is written in the post, a line for each text."""
        further = (value if isinstance(value, list) else [value] for value in self.texts.values())
        return "\n".join(filter(None, [self.text, *chain.from_iterable(further)]))


def parse_sample(data: bytes, key: str, text_bytes: int | None = None) -> RawSample:
    """The sample in a range of a tar.

    Args:
        data: all members of the sample, or the first of them.
        key: what their names begin with.
        text_bytes: leave out the media; what is written in the post is of this size.

    Raises:
        ValueError, KeyError, TypeError: the range is no such sample. The error's own text may quote the post.
    """
    post: dict[str, Any] | None = None
    text: str | None = None
    images: list[bytes] = []
    video = audio = None
    texts: dict[str, Any] = {}
    found = 0
    for suffix, content in _members(data, key, text_bytes is not None):
        extension = suffix.rpartition(".")[2]
        if suffix == "json":
            post = json.loads(content)
        elif suffix == "txt":
            text = content.decode()
            found += len(content)
        elif suffix == TEXTS:
            texts = json.loads(content)
            found += len(content)
        elif extension in IMAGE_EXTENSIONS:
            images.append(content)
        elif extension in VIDEO_EXTENSIONS:
            video = content
        elif extension in AUDIO_EXTENSIONS:
            audio = content
        else:
            raise ValueError("unknown extension")
    if post is None:
        raise ValueError("no fields")
    if text_bytes not in (None, found):
        raise ValueError("cut short")
    return RawSample(post, text, images, video, audio, texts)


def _members(data: bytes, key: str, head_only: bool) -> Iterator[tuple[str, bytes]]:
    """(what follows the key, content) of the members in a range of a tar, which are sorted: fields, text, then media.

    All that our own shards need: short names, regular files. Checksums of headers are not added up: the sample's digest
    has covered them.
    """
    start = 0
    while start + BLOCK <= len(data):
        header = data[start : start + BLOCK]
        name = header[NAME].rstrip(b"\0").decode()
        if not name.startswith(f"{key}.") or header[TYPE] not in (b"0", b"\0"):
            raise ValueError("unexpected member")
        suffix = name[len(key) + 1 :]
        if head_only and suffix not in HEAD:
            return
        size = int(header[SIZE].rstrip(b"\0 "), 8)
        start += BLOCK
        if start + size > len(data):
            raise ValueError("cut short")
        yield suffix, data[start : start + size]
        start += -(-size // BLOCK) * BLOCK

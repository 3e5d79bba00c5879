"""Media files on their way into a shard: where they may lie, what they are, whether they are whole."""

from __future__ import annotations

import os
import stat
from pathlib import Path

IMAGE_EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp"))
VIDEO_EXTENSIONS = frozenset(("mp4", "m4v", "mov", "webm", "mkv", "avi"))
AUDIO_EXTENSIONS = frozenset(("flac", "wav", "mp3", "ogg", "opus", "m4a", "aac"))

# A tar header of the USTAR format has eleven octal digits for a member's size.
MAX_MEMBER_BYTES = 8**11 - 1


class RefusedMedia(Exception):
    """A media item that keeps its post out of the shards; the message is the reason."""


class FolderGuard:
    """Finds paths that leave their folder once every symbolic link is followed; remembers the folders it has seen."""

    def __init__(self) -> None:
        self._real: dict[str, str] = {}

    def leaves(self, root: Path, path: str) -> bool:
        """Whether `path`, relative to `root`, ends outside of `root`. Nothing needs to be there."""
        inside = self._resolve(str(root))
        folder, name = os.path.split(path)
        target = os.path.join(self._resolve(os.path.join(inside, folder)), name)
        if os.path.islink(target):
            target = os.path.realpath(target)
        return not target.startswith(os.path.join(inside, ""))

    def _resolve(self, folder: str) -> str:
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder)
        return self._real[folder]


def read_file(path: Path) -> bytes:
    """The bytes of a media file.

    Raises:
        RefusedMedia: it is missing, empty, no regular file, or larger than a tar member can be.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise RefusedMedia("no regular file")
        if about.st_size > MAX_MEMBER_BYTES:
            raise RefusedMedia("larger than 8 GiB")
        data = path.read_bytes()
    except OSError as error:
        raise RefusedMedia(
            "missing" if isinstance(error, FileNotFoundError) else f"unreadable ({error.strerror})"
        ) from None
    if not data:
        raise RefusedMedia("empty")
    return data


def image_extension(data: bytes) -> str:
    """jpg, png or webp, decided by the content alone, after the whole image was decoded.

    Raises:
        RefusedMedia: another format, or damaged.
    """
    from crossguard.data.loading.decode import check_image

    reason = check_image(data) if data else "empty"
    if reason:
        raise RefusedMedia(reason)
    return image_kind(data)


def image_kind(data: bytes) -> str:
    """jpg, png or webp by the first bytes of an image that is known to be one of them."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    return "png" if data.startswith(b"\x89PNG") else "webp"


def clip_extension(data: bytes, path: str | None, known: frozenset[str]) -> str:
    """The extension of a video or a recording: that of its path, or what its first bytes say when it has none.

    Args:
        data: the file's bytes.
        path: where it was read from, None for bytes of a source.
        known: the extensions that may stand in a shard.

    Raises:
        RefusedMedia: an unknown kind, or empty.
    """
    if not data:
        raise RefusedMedia("empty")
    candidates = _sniffed(data) if path is None else (os.path.splitext(path)[1].lstrip(".").lower(),)
    for extension in candidates:
        if extension in known:
            return extension
    raise RefusedMedia(f"unknown kind of file; known are {', '.join(sorted(known))}")


def check_clip(data: bytes, field: str) -> None:
    """Decode the middle frame of a video, or the start of a recording, as `field` says.

    Raises:
        RefusedMedia: that is not possible.
    """
    from crossguard.data.loading.clips import check_video
    from crossguard.data.loading.sound import check_sound

    reason = check_video(data) if field == "video" else check_sound(data)
    if reason:
        raise RefusedMedia(reason)


def _sniffed(data: bytes) -> tuple[str, ...]:
    if data[4:8] == b"ftyp":
        return ("mp4", "m4a")
    if data[:4] == b"RIFF":
        return ("avi",) if data[8:12] == b"AVI " else ("wav",)
    if data[:3] == b"ID3" or data[:2] in (b"\xff\xfb", b"\xff\xf3", b"\xff\xf2"):
        return ("mp3",)
    magic = {b"\x1a\x45\xdf\xa3": ("webm",), b"fLaC": ("flac",), b"OggS": ("ogg",)}
    return magic.get(data[:4], ())

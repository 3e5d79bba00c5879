"""This node's copies of files that lie behind a URL, shared without races by all processes of the node.

    .crossguard-cache     marks the folder: nothing is ever deleted where it is missing
    files/ab/abcd…        whole files under the SHA-256 of their content, whatever URL they came from
    partial/abcd….SIZE    downloads; SIZE is reserved for each
    locks/abc             held while a file whose hash begins so is downloaded
    space                 bytes stored and reserved, or more; held while room is made

A file that a process has open may be removed: its content stays until it is closed.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from crossguard.configs.errors import UserError
from crossguard.configs.schema.data import CacheConfig
from crossguard.data.shards.files import descriptor_sha256
from crossguard.data.shards.storage import explain

MARKER = ".crossguard-cache"
FILES, PARTIAL, LOCKS, SPACE = "files", "partial", "locks", "space"
HASH = re.compile(r"[0-9a-f]{64}")
# Where room is made, it is made for more than one file: every time takes a look at all files.
KEPT = 0.9
# Enough locks that downloads hardly ever wait for each other.
LOCK_DIGITS = 3
SECONDS_BETWEEN_LOOKS = 0.1
GB = 10**9


class DamagedError(Exception):
    """What lies behind a URL is not what the manifest was written for."""


@dataclass(frozen=True, slots=True)
class NodeCache:
    """A folder with copies, and the bytes that they may take; can be sent to other processes."""

    folder: Path
    limit: int

    @classmethod
    def open(cls, config: CacheConfig) -> NodeCache:
        """The cache, made if need be; what killed downloads left is removed.

        Raises:
            UserError: the folder cannot be written, or holds something that no cache put there.
        """
        cache = cls(cache_folder(config), int(config.max_gb * GB))
        if "~" in cache.folder.parts:
            raise UserError("data.cache.dir: this user has no home folder for it; name one that can be written")
        try:
            cache._prepare()
            cache._in_flight()
        except OSError as error:
            raise UserError(
                f"data.cache.dir: {cache.folder} cannot be written ({explain(error)}); choose another folder"
            ) from error
        return cache

    def open_file(self, sha256: str, size: int, download: Callable[[Path], None], *, check: bool = False) -> int:
        """A descriptor of the file with this content, to be closed by the caller.

        Args:
            sha256: of the content, in hex.
            size: bytes.
            download: writes the content to a path, where the cache has no copy; called by one process at a time.
            check: compare the content of a copy that is there, and download it again if it is damaged.

        Raises:
            DamagedError: twice, what was downloaded had another content.
            UserError: the file is larger than the cache may be.
            OSError: the disk failed.
            What `download` raises.
        """
        path = self.folder / FILES / sha256[:2] / sha256
        descriptor = None if check else _open(path)
        if descriptor is None:
            try:
                self._prepare()
                with _locked(self._lock(sha256)):
                    descriptor = _open_whole(path) if check else _open(path)
                    if descriptor is None:
                        descriptor = self._download(path, size, download)
            except FileNotFoundError as error:  # somebody removes the whole folder just now; another try makes it again
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self.folder)) from error
        with suppress(PermissionError):  # of another user
            os.utime(descriptor)
        return descriptor

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _mark(self.folder)
        for name in (FILES, PARTIAL, LOCKS):
            (self.folder / name).mkdir(exist_ok=True)

    def _download(self, path: Path, size: int, download: Callable[[Path], None]) -> int:
        """Fetch a file while its lock is held. It is opened before others see it, and could remove it again."""
        for _ in range(2):
            partial = self._reserve(path.name, size)
            try:
                download(partial)
                descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
                if descriptor_sha256(descriptor) == path.name:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    partial.replace(path)
                    return descriptor
                os.close(descriptor)
            finally:
                partial.unlink(missing_ok=True)
        raise DamagedError

    def _reserve(self, sha256: str, size: int) -> Path:
        """Make room for a download, and return its path once there is some."""
        if size > self.limit:
            raise UserError(
                f"data.cache.max_gb={self.limit / GB:g}: one file has {size / GB:.3g} GB, and every process that loads "
                "needs another; set a higher limit"
            )
        for stale in (self.folder / PARTIAL).glob(f"{sha256[:LOCK_DIGITS]}*"):
            stale.unlink(missing_ok=True)  # of killed processes: the lock is held here
        partial = self.folder / PARTIAL / f"{sha256}.{size}"
        while True:
            with _locked(self.folder / SPACE) as space:
                noted = os.pread(space, 32, 0)
                # What is noted may be too much, never too little: killed and failed downloads are still in it.
                used = int(noted) if noted.isdigit() else self.limit
                if used + size > self.limit:
                    used = self._make_room(size)
                if used + size <= self.limit:
                    os.ftruncate(space, 0)
                    os.pwrite(space, str(used + size).encode(), 0)
                    partial.touch()
                    return partial
            time.sleep(SECONDS_BETWEEN_LOOKS)  # everything that is left is being downloaded: it becomes removable

    def _make_room(self, size: int) -> int:
        """Remove what was not used for longest, and return the bytes that are still stored or reserved."""
        used = self._in_flight()  # first: what becomes a file meanwhile may count twice, but is not overlooked
        files = []
        folders = [folder for folder in os.scandir(self.folder / FILES) if folder.is_dir(follow_symlinks=False)]
        for entry in itertools.chain.from_iterable(map(os.scandir, folders)):
            if HASH.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):
                    stat = entry.stat()
                    files.append((stat.st_mtime_ns, stat.st_size, entry.path))
        used += sum(stored for _, stored, _ in files)
        for _, stored, path in sorted(files):
            if used + size <= KEPT * self.limit:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            used -= stored
        return used

    def _in_flight(self) -> int:
        """Bytes that are reserved for downloads; removes what killed ones left."""
        reserved = 0
        for entry in os.scandir(self.folder / PARTIAL):
            sha256, _, size = entry.name.partition(".")
            if HASH.fullmatch(sha256) and size.isdigit():
                try:
                    with _locked(self._lock(sha256), wait=False):
                        Path(entry.path).unlink(missing_ok=True)
                except BlockingIOError:
                    reserved += int(size)
        return reserved

    def _lock(self, sha256: str) -> Path:
        return self.folder / LOCKS / sha256[:LOCK_DIGITS]


def cache_folder(config: CacheConfig) -> Path:
    """Where the configuration wants the cache to be."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(config.dir or f"{base}/crossguard/shards")).resolve()


def check_apart(config: CacheConfig, shards_dir: Path) -> None:
    """Check that the cache and a folder of shards do not lie in each other.

    Raises:
        UserError: they do.
    """
    cache, shards = cache_folder(config), shards_dir.resolve()
    if cache == shards or cache in shards.parents or shards in cache.parents:
        raise UserError(
            f"data.cache.dir: {cache} and the shards' folder {shards} lie in each other; choose another folder"
        )


def _mark(folder: Path) -> None:
    """Mark an empty folder as a cache. The mark comes before anything else: what has none is not a cache."""
    marker = folder / MARKER
    if not marker.exists():
        if any(folder.iterdir()) and not marker.exists():  # the second look: another process may have marked it
            raise UserError(f"data.cache.dir: {folder} is neither empty nor a cache; choose another folder")
        with marker.open("a") as file:
            file.write("Copies of shards, made by crossguard. They may be deleted at any time.\n")


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[int]:
    """Hold the lock of a file, which is never removed; the kernel gives it back when this process ends.

    Raises:
        BlockingIOError: another one holds it, and this one does not want to wait.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield descriptor
    finally:
        os.close(descriptor)


def _open_whole(path: Path) -> int | None:
    """A descriptor of the file if it has the content that its name says; else it is removed."""
    descriptor = _open(path)
    if descriptor is not None and descriptor_sha256(descriptor) != path.name:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        return None
    return descriptor


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None

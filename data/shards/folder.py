"""A set of shards: where it lies, its manifest, and its files, which are copied to this node where need be."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from crossguard.configs.errors import UserError
from crossguard.configs.schema.data import CacheConfig
from crossguard.data.shards import manifest as manifests
from crossguard.data.shards.cache import DamagedError, NodeCache, check_apart
from crossguard.data.shards.files import descriptor_sha256
from crossguard.data.shards.index import index_bytes
from crossguard.data.shards.manifest import Manifest, ShardInfo
from crossguard.data.shards.remote import Remote
from crossguard.data.shards.storage import LostError, local_path, with_retries

# Small files wait for the network, not for the processor.
DOWNLOADS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class ShardFolder:
    """A location and the manifest that lies there; can be sent to other processes.

    Attributes:
        location: a local folder or, with a cache, a URL without a slash at its end.
        manifest: what lies there.
        cache: where copies of what lies behind a URL are kept; None for a local folder.
    """

    location: str
    manifest: Manifest
    cache: NodeCache | None = None

    @classmethod
    def open(cls, location: str | Path, config: CacheConfig) -> ShardFolder:
        """The shards at a folder or a URL.

        Raises:
            UserError: there is no manifest, it is damaged, the URL cannot be opened, or the cache cannot be used.
            JobError: the storage fails.
        """
        manifest = read_manifest(location)
        folder = local_path(location)
        if folder is None:
            return cls(str(location).rstrip("/"), manifest, NodeCache.open(config))
        check_apart(config, folder)
        return cls(str(folder), manifest)

    def open_tar(self, shard: ShardInfo, *, check: bool = False) -> int:
        """A descriptor of a tar, to be closed by the caller.

        Args:
            shard: of this folder.
            check: compare this node's copy as a whole, and fetch it anew if it is damaged.

        Raises:
            LostError: it is missing, or what lies behind the URL is not what the manifest says.
            OSError, JobError: the storage fails.
        """
        try:
            return self._open(shard.path, shard.sha256, shard.bytes, check)
        except DamagedError:
            raise LostError("is not what the manifest says") from None

    def open_index(self, shard: ShardInfo, *, check: bool) -> int:
        """A descriptor of an index, to be closed by the caller.

        Args:
            shard: of this folder.
            check: compare its content with the manifest.

        Raises:
            LostError: it is missing.
            UserError: it is not what the manifest says: which samples there are cannot be known.
            OSError, JobError: the storage fails.
        """
        try:
            descriptor = self._open(shard.index_path, shard.index_sha256, index_bytes(shard.samples), check)
            if check and self.cache is None and descriptor_sha256(descriptor) != shard.index_sha256:
                os.close(descriptor)
                raise DamagedError
            return descriptor
        except DamagedError:
            raise UserError(
                f"{self.location}/{shard.index_path}: changed since the manifest was written; "
                "restore it, or build again"
            ) from None

    def fetch_indexes(self, shards: Sequence[ShardInfo]) -> None:
        """Copy indexes to this node, many at a time; nothing for a local folder. Raises as `open_index` does."""
        if self.cache is not None:
            with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as threads:
                list(threads.map(self._fetch_index, shards))

    def sizes(self, split: str) -> dict[str, int]:
        """Path (as in the manifest) -> bytes of every file of a split: one listing, whatever their number.

        Raises:
            JobError: the storage fails.
        """
        if self.cache is not None:
            return Remote(self.location).sizes(split)

        def listing() -> dict[str, int]:
            with os.scandir(f"{self.location}/{split}") as entries:
                return {f"{split}/{entry.name}": entry.stat().st_size for entry in entries}

        try:
            return with_retries(f"{self.location}/{split}", listing)
        except FileNotFoundError:
            return {}

    def check_files(self) -> list[ShardInfo]:
        """Check cheaply that the files are those the manifest was written for.

        The sizes of all tars are compared, and the hashes of local indexes; those behind a URL are compared when they
        are copied. What a tar holds is compared sample by sample, when it is read.

        Returns:
            The shards whose tar or index is missing, or whose tar has another size.

        Raises:
            UserError: an index changed.
            JobError: the storage fails.
        """
        sizes = {path: size for split in self.manifest.splits for path, size in self.sizes(split).items()}
        lost = []
        for shard in self.manifest.shards:
            if sizes.get(shard.path) != shard.bytes or shard.index_path not in sizes:
                lost.append(shard)
            elif self.cache is None:
                self._check_index(shard)
        return lost

    def _check_index(self, shard: ShardInfo) -> None:
        self._touch_index(shard, check=True)

    def _fetch_index(self, shard: ShardInfo) -> None:
        with suppress(LostError):  # told when its samples are read
            self._touch_index(shard, check=False)

    def _touch_index(self, shard: ShardInfo, check: bool) -> None:
        place = f"{self.location}/{shard.index_path}"
        with_retries(place, lambda: os.close(self.open_index(shard, check=check)))

    def _open(self, path: str, sha256: str, size: int, check: bool) -> int:
        if self.cache is not None:
            return self.cache.open_file(sha256, size, lambda target: self._download(path, target), check=check)
        try:
            return os.open(f"{self.location}/{path}", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise LostError("is missing") from None

    def _download(self, path: str, target: Path) -> None:
        remote = Remote(self.location)
        try:
            remote.download(path, target)
        except FileNotFoundError:
            if remote.exists(path):  # then it is the target's folder that is not there any more
                raise
            raise LostError("is missing") from None


def read_manifest(location: str | Path) -> Manifest:
    """The manifest at a folder or a URL; raises as `ShardFolder.open` does."""
    folder = local_path(location)
    if folder is not None:
        return Manifest.load(folder)
    remote = Remote(str(location).rstrip("/"))
    return Manifest.read(lambda: remote.read(manifests.FILE_NAME), f"{remote.url}/{manifests.FILE_NAME}")


def has_manifest(location: str | Path) -> bool:
    """Whether finished shards lie at a folder or a URL.

    Raises:
        UserError: the URL cannot be opened.
        JobError: the storage fails.
    """
    folder = local_path(location)
    if folder is not None:
        return (folder / manifests.FILE_NAME).exists()
    return Remote(str(location).rstrip("/")).exists(manifests.FILE_NAME)

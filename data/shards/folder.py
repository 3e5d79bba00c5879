"""A set of shards: where it lies and its manifest."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from crossguard.configs.errors import UserError
from crossguard.configs.schema.data import CacheConfig
from crossguard.data.shards.manifest import Manifest, ShardInfo, file_sha256
from crossguard.data.shards.storage import with_retries


@dataclass(frozen=True, slots=True)
class ShardFolder:
    """A location and the manifest that lies there; can be sent to other processes."""

    location: str
    manifest: Manifest

    @classmethod
    def open(cls, location: str | Path, cache: CacheConfig) -> ShardFolder:
        """The shards at `location`.

        Args:
            location: their folder.
            cache: where copies are kept of shards that lie behind a URL.

        Raises:
            UserError: there is no manifest, or it is damaged.
            JobError: the storage fails.
        """
        return cls(str(location), Manifest.load(Path(location)))

    def tar(self, shard: ShardInfo) -> Path:
        """A local file with the tar's content.

        Raises:
            FileNotFoundError: it is missing (a local one may also be so when it is opened).
            JobError: the storage fails.
        """
        return Path(self.location) / shard.path

    def index(self, shard: ShardInfo) -> Path:
        """A local file with the index's content; raises as `tar` does."""
        return Path(self.location) / shard.index_path

    def sizes(self, split: str) -> dict[str, int]:
        """Path (as in the manifest) -> bytes of every file of a split: one listing, whatever their number.

        Raises:
            JobError: the storage fails.
        """

        def listing() -> dict[str, int]:
            with os.scandir(Path(self.location) / split) as entries:
                return {f"{split}/{entry.name}": entry.stat().st_size for entry in entries}

        try:
            return with_retries(f"{self.location}/{split}", listing)
        except FileNotFoundError:
            return {}

    def check_files(self) -> list[ShardInfo]:
        """Check cheaply that the files are those the manifest was written for.

        The sizes of all tars are compared, and the hashes of all indexes. What a tar holds is compared sample by
        sample, when it is read.

        Returns:
            The shards whose tar or index is missing, or whose tar has another size.

        Raises:
            UserError: an index changed: which samples there are cannot be known.
        """
        sizes = {path: size for split in self.manifest.splits for path, size in self.sizes(split).items()}
        lost = []
        for shard in self.manifest.shards:
            if sizes.get(shard.path) != shard.bytes or shard.index_path not in sizes:
                lost.append(shard)
            else:
                self._check_index(shard)
        return lost

    def _check_index(self, shard: ShardInfo) -> None:
        path = self.index(shard)
        if with_retries(str(path), lambda: file_sha256(path)) != shard.index_sha256:
            raise UserError(f"{path}: changed since the manifest was written; restore it, or build again")

"""Where shards lie, for tools that look at every file once: a folder, or a URL whose files are copied for the look."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from crossguard.data.shards.remote import Remote
from crossguard.data.shards.storage import local_path


@dataclass(frozen=True, slots=True)
class Place:
    """A folder or a URL; can be sent to other processes."""

    location: str  # without a slash at its end

    @classmethod
    def of(cls, location: str | Path) -> Place:
        """The place that a user names."""
        folder = local_path(location)
        return cls(str(location).rstrip("/") if folder is None else str(folder))

    @contextmanager
    def files(self, *paths: str) -> Iterator[Path]:
        """A folder in which these files lie, as far as they exist, until the block ends.

        Raises:
            UserError: the URL cannot be opened, or access is refused.
            JobError: the storage fails.
        """
        folder = local_path(self.location)
        if folder is not None:
            yield folder
            return
        with tempfile.TemporaryDirectory(prefix="crossguard-") as copies:
            for path in paths:
                target = Path(copies) / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):
                    Remote(self.location).download(path, target)
            yield Path(copies)

    def listing(self) -> list[str]:
        """The paths of all files, relative to this place; raises as `files`."""
        folder = local_path(self.location)
        if folder is None:
            return Remote(self.location).files()
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]

    def __str__(self) -> str:
        return self.location

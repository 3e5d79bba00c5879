"""The folder `.build` inside the shards' folder: what a build needs until its manifest is in place.

It holds the lock, the spool, the plan and the done-records. A build that was killed leaves it behind, and the next one
goes on from it; the finished shards hold no trace of it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from crossguard.configs.errors import JobError, UserError
from crossguard.data.shards import plan as plans
from crossguard.data.shards.manifest import FILE_NAME, VERSIONS_FOLDER, Manifest, version_name
from crossguard.data.shards.plan import Plan
from crossguard.data.shards.writer import BUILD_FOLDER, DONE_FOLDER

_LOCK = "lock"
# A process that was killed while it started another one leaves that one with the lock until it has died as well.
_SECONDS_TO_DIE = 5


class Workspace:
    """Holds the lock of a build on its shards' folder; on a `UserError` it leaves nothing half-built behind."""

    def __init__(self, shards_dir: Path):
        self.shards_dir = shards_dir
        self.path = shards_dir / BUILD_FOLDER
        # What goes again if the posts are wrong, so far as it is empty: folders that only a build has made.
        self._made = [folder for folder in (shards_dir, *shards_dir.parents) if not folder.exists()]
        if self.path.exists():
            self._made.insert(0, shards_dir)

    def __enter__(self) -> Workspace:
        """
        Raises:
            UserError: the folder holds files that no build put there.
            JobError: another build holds the lock.
        """
        if self.shards_dir.exists() and not self._is_ours() and any(self.shards_dir.iterdir()):
            raise UserError(f"{self.shards_dir}: neither empty nor shards; choose another folder with data.shards=DIR")
        self._lock = _lock(self.path)
        (self.path / DONE_FOLDER).mkdir(exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, UserError):
            self.discard()
            shutil.rmtree(self.path)
            for folder in self._made:
                with suppress(OSError):
                    folder.rmdir()
        elif error is None:
            # First the plan: without it, what a kill leaves of the folder is no build to go on with.
            (self.path / plans.FILE_NAME).unlink(missing_ok=True)
            shutil.rmtree(self.path)
        os.close(self._lock)

    def discard(self) -> None:
        """Remove all that an unfinished build wrote, but not the lock and nothing that a manifest lists."""
        plan = Plan.load(self.path)
        current = Manifest.load(self.shards_dir) if (self.shards_dir / FILE_NAME).exists() else None
        listed = {shard.path for shard in current.shards} if current else set()
        for shard in plan.shards if plan else ():
            if shard.path not in listed:
                for path in (shard.path, shard.index_path):
                    (self.shards_dir / path).unlink(missing_ok=True)
        if plan:
            self.remove_empty_splits(plan)
        if current:
            (self.shards_dir / version_name(current.sha256)).unlink(missing_ok=True)
            with suppress(OSError):
                (self.shards_dir / VERSIONS_FOLDER).rmdir()
        (self.path / plans.FILE_NAME).unlink(missing_ok=True)  # before what it speaks of
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()
        (self.path / DONE_FOLDER).mkdir()

    def remove_empty_splits(self, plan: Plan) -> None:
        """Remove the folders of splits that no shard came to lie in."""
        for split in {Path(shard.path).parent for shard in plan.shards}:
            with suppress(OSError):
                (self.shards_dir / split).rmdir()

    def _is_ours(self) -> bool:
        return self.path.exists() or (self.shards_dir / FILE_NAME).exists()


def _lock(folder: Path) -> int:
    """Take the lock in `folder`, which is made if need be; the kernel gives it back when this process ends.

    Raises:
        JobError: another process holds it.
    """
    deadline = time.monotonic() + _SECONDS_TO_DIE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another build finished just now and removed the folder
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode()
            os.close(descriptor)
            if not _alive(holder) and time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            raise JobError(
                f"{folder.parent}: process {holder or '?'} is building here; wait for it or end it"
            ) from None
        if os.fstat(descriptor).st_nlink:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return descriptor
        os.close(descriptor)  # the lock of a folder that another build has removed meanwhile


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:  # it is another user's
        pass
    return True

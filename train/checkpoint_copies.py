"""Copies of the checkpoints behind a URL (`checkpoint.copy_to`), for machines whose disks do not outlive them.

A copy is complete when its manifest is there, which is written last and carries its own hash: an upload that was killed
or refused leaves files that nothing takes for a checkpoint.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from crossguard.configs.errors import CrossguardError
from crossguard.data.shards.files import sync
from crossguard.data.shards.remote import Remote
from crossguard.train import checkpoint_folder as folder
from crossguard.train.checkpoint_manifest import MANIFEST, DamagedCheckpoint, parse_manifest, verify
from crossguard.train.ranks import Ranks

logger = logging.getLogger(__name__)


class CheckpointCopies:
    """The checkpoints of one run behind a URL.

    Args:
        url: a folder that this run has for itself.

    Every method raises UserError where access is refused, and JobError where the storage fails however often it is
    tried; checkpoints that were complete before stay so.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._remote = Remote(self.url)

    def put(self, checkpoint: Path, own_files: Iterable[str], ranks: Ranks) -> None:
        """Copy a complete checkpoint; all ranks call it, each copies its own files.

        Copies of checkpoints that the run directory does not keep are removed afterwards.
        """
        error: Exception | None = None
        try:
            for name in own_files:
                self._remote.upload(checkpoint / name, f"{checkpoint.name}/{name}")
        except (CrossguardError, OSError) as failed:
            error = failed
        ranks.agree(error)
        ranks.on_first(lambda: self._complete(checkpoint))

    def take(self, run_dir: Path) -> list[Path]:
        """Download the complete ones that the run directory lacks, oldest first; damaged ones are left out.

        Returns:
            Their places in the run directory.
        """
        there = {path.name for path in folder.checkpoint_folders(run_dir)}
        found = [self._download(run_dir, name) for name in self._complete_ones() if name not in there]
        taken = [path for path in found if path is not None]
        if taken:
            folder.point(run_dir)
        return taken

    def newest_state(self) -> dict[str, Any] | None:
        """What the newest complete one says about itself, or None where there is none."""
        names = self._complete_ones()
        if not names:
            return None
        state: dict[str, Any] = json.loads(self._remote.read(f"{names[-1]}/{folder.STATE}"))
        return state

    def _complete(self, checkpoint: Path) -> None:
        self._remote.upload(checkpoint / MANIFEST, f"{checkpoint.name}/{MANIFEST}")
        kept = {path.name for path in folder.checkpoint_folders(checkpoint.parent.parent)}
        for name in self._remote.folders():
            if folder.is_name(name) and name not in kept:
                self._remote.remove(f"{name}/{MANIFEST}")
                self._remote.remove(name)

    def _complete_ones(self) -> list[str]:
        return sorted(filter(self._is_complete, filter(folder.is_name, self._remote.folders())))

    def _is_complete(self, name: str) -> bool:
        try:
            parse_manifest(self._remote.read(f"{name}/{MANIFEST}"), f"{self.url}/{name}/{MANIFEST}")
        except (FileNotFoundError, DamagedCheckpoint):
            return False
        return True

    def _download(self, run_dir: Path, name: str) -> Path | None:
        """Appears in the run directory when all of it is there and whole."""
        staging = folder.open_staging(run_dir, folder.step_of(Path(name)))
        try:
            for path in self._remote.sizes(name):
                self._remote.download(path, staging / Path(path).name)
            verify(staging)
            final = staging.with_name(name)
            sync(staging)
            staging.rename(final)
        except DamagedCheckpoint as damage:
            logger.warning("%s/%s is damaged and not used: %s", self.url, name, damage)
            return None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return final

"""Saving everything that a resumed run needs, in a format without ranks and without ZeRO stages (see checkpoint.py).

Every rank writes its files into a staging folder; when all of them are complete, rank 0 adds the manifest and renames
the folder. In the background, all of this happens in one thread a rank, whose ranks agree over connections of their
own: training waits for the copy to the host's memory alone, and no step of it for another rank's disk.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from crossguard.configs.errors import JobError, Preempted
from crossguard.data.shards.files import write_atomic
from crossguard.train import checkpoint_folder as folder
from crossguard.train.checkpoint_copies import CheckpointCopies
from crossguard.train.checkpoint_manifest import Entry, entry
from crossguard.train.fragment_file import write_tensors
from crossguard.train.fragments import Fragment, model_fingerprint, optimizer_steps, owned_blocks, tensor_shapes
from crossguard.train.host_copy import HostCopy
from crossguard.train.nvme import is_on_nvme
from crossguard.train.random_state import random_name, random_state

if TYPE_CHECKING:
    from crossguard.train.engine import Engine


class CheckpointSaver:
    """Saves the states of one run; leaving its block completes the save that is under way.

    Args:
        run_dir: the run directory.
        engine: whose weights and moments are saved.
        keep_last: how many of the newest checkpoints stay.
        in_background: `save` returns as soon as the state is copied; what lies on NVMe is not copied but written at
            once, for it may not fit into memory.
        copies: where a complete one is copied to, if anywhere.
    """

    def __init__(
        self,
        run_dir: Path,
        engine: Engine,
        *,
        keep_last: int,
        in_background: bool = False,
        copies: CheckpointCopies | None = None,
    ):
        self._run_dir, self._engine, self._keep_last, self._copies = run_dir, engine, keep_last, copies
        in_background = in_background and not is_on_nvme(engine.deepspeed.optimizer)
        self._ranks = engine.ranks.beside() if in_background else engine.ranks
        self._thread = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self._pending: Future[None] | None = None
        self._copy = HostCopy()

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.finish()
        except Exception as failed:
            if error is None or isinstance(error, Preempted):  # which says that this very step is saved
                raise
            # The error that ends the job is told by others; it must not hide this one, nor this one that.
            logging.getLogger(__name__).exception("the last save failed")
            self._ranks.say(str(failed))
        finally:
            if self._thread is not None:
                self._thread.shutdown()

    def save(self, state: dict[str, Any], attached: Mapping[str, bytes], *, best: bool = False) -> None:
        """Save the state after step `state["step"]`; all ranks call it.

        Args:
            state: what the loop counts, as JSON; the same on every rank.
            attached: further files, by name; the same on every rank.
            best: this state's evaluation is the best so far.

        Raises:
            JobError: a rank could not write (a full disk) or copy, this state or, in the background, the one before;
                earlier checkpoints are untouched.
        """
        self.finish()
        engine, rank, step = self._engine, self._ranks.rank, state["step"]
        blocks = map(_by_name, owned_blocks(engine))
        files = {random_name(rank): json.dumps(random_state()).encode()}
        if rank == 0:
            about = {
                "world_size": self._ranks.world_size,
                "zero_stage": engine.stage,
                "optimizer_steps": optimizer_steps(engine),
                "model": model_fingerprint(engine.model),
                "shapes": tensor_shapes(engine.model),
            }
            files |= {folder.STATE: json.dumps(about | state).encode(), **attached}
        if self._thread is None:
            self._write(step, blocks, files, best)
        else:
            (tensors,) = blocks
            self._pending = self._thread.submit(self._write, step, [self._copy.take(tensors)], files, best)

    def finish(self) -> None:
        """Wait for the save under way.

        Raises:
            JobError: it failed; on every rank.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, blocks: Iterable[dict[str, torch.Tensor]], files: dict[str, bytes], best: bool) -> None:
        """Write this rank's files; commit when all ranks have written theirs."""
        ranks = self._ranks
        error: Exception | None = None
        written: dict[str, Entry] = {}
        staging: Path = ranks.on_first(lambda: self._open_staging(step))
        try:
            for number, tensors in enumerate(blocks):
                name = f"fragments-{f'{number:03d}-' if number else ''}{ranks.rank:05d}.safetensors"
                written[name] = write_tensors(staging / name, tensors)
            for name, content in files.items():
                write_atomic(staging / name, content)
                written[name] = entry(content)
        except OSError as failed:
            error = self._refused(failed)
        everyone = ranks.gather((error, written))
        entries = {name: stated for _, part in everyone for name, stated in part.items()}
        failure = next((failure for failure, _ in everyone if failure is not None), None)
        ranks.on_first(lambda: self._commit(staging, step, entries, best, failure))
        if self._copies is not None:
            self._copies.put(staging.with_name(folder.folder_name(step)), written, ranks)

    def _open_staging(self, step: int) -> Path:
        try:
            return folder.open_staging(self._run_dir, step)
        except OSError as failed:
            raise self._refused(failed) from failed

    def _commit(
        self, staging: Path, step: int, entries: dict[str, Entry], best: bool, failure: Exception | None
    ) -> None:
        """Complete the checkpoint, or remove what there is of it where a rank has failed."""
        try:
            if failure is not None:
                raise failure
            folder.commit(staging, step, entries, best=best)
            folder.prune(self._run_dir, self._keep_last)
        except OSError as failed:
            raise self._refused(failed) from failed
        finally:
            shutil.rmtree(staging, ignore_errors=True)  # Renamed, where all went well.

    def _refused(self, error: OSError) -> JobError:
        newest = folder.latest_checkpoint(self._run_dir)
        kept = f"{newest.name} is untouched" if newest else "there is none yet"
        return JobError(
            f"{self._run_dir / 'checkpoints'}: rank {self._ranks.rank} cannot save a checkpoint"
            f" ({error.strerror or error}); {kept}; free space there, or allow writing, then start again to resume"
        )


def _by_name(block: list[Fragment]) -> dict[str, torch.Tensor]:
    return {f"{part.kind}:{part.start}:{part.name}": part.tensor for part in block}

"""The folder `checkpoints/`: complete or absent, verified, retained by rule. Knows files, nothing of tensors.

checkpoints/step-00000100/           manifest.json names every other file with its size and hash
checkpoints/latest, best             a folder's name as text
checkpoints/step-00000100.damaged/   was found damaged; never removed
checkpoints/.staging-…               a save under way; what a killed save left is removed at the next start
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from crossguard.configs.errors import UserError
from crossguard.data.shards.files import sync, write_atomic
from crossguard.train.checkpoint_manifest import DamagedCheckpoint, Entry, is_intact, read_manifest, write_manifest

STAGING = ".staging-"
REPLACED = f"{STAGING}replaced-"
STATE = "state.json"


def checkpoints_of(run_dir: Path) -> list[Path]:
    """The checkpoints of a run directory, oldest first, without those in which damage can be seen at once."""
    return [path for path in checkpoint_folders(run_dir) if is_intact(path)]


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """Every checkpoint of a run directory, damaged or not, oldest first."""
    folder = run_dir / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else iter(())
    return sorted((path for path in found if re.fullmatch(r"step-\d{8,}", path.name)), key=step_of)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint, or None in a run directory without one."""
    return next(filter(is_intact, reversed(checkpoint_folders(run_dir))), None)


def best_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint whose evaluation was the best, or None when there was no evaluation."""
    named = named_best(run_dir)
    return named if named is not None and is_intact(named) else None


def named_best(run_dir: Path) -> Path | None:
    """The folder that `best` names, damaged or not, or None where there is none."""
    name = _pointer(run_dir, "best")
    return next((path for path in checkpoint_folders(run_dir) if path.name == name), None)


def best_or_latest(run_dir: Path) -> Path:
    """The checkpoint that is evaluated and exported: the best by `checkpoint.metric` when there are evaluations.

    Raises:
        UserError: the run directory has no checkpoint.
    """
    chosen = best_checkpoint(run_dir) or latest_checkpoint(run_dir)
    if chosen is None:
        raise UserError(f"{run_dir}: no checkpoint; train first (crossguard train)")
    return chosen


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("step-"))


def folder_name(step: int) -> str:
    """step-00000100"""
    return f"step-{step:08d}"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says about itself: step, position, configuration, shapes, evaluations.

    Raises:
        UserError: the file cannot be read, or another version of crossguard wrote it.
    """
    read_manifest(checkpoint)
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{checkpoint / STATE}: unreadable ({error})") from None
    return state


def open_staging(run_dir: Path, step: int) -> Path:
    """A new folder for a save; its remains from a killed one are removed."""
    staging = run_dir / "checkpoints" / f"{STAGING}{folder_name(step)}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def remove_staging(run_dir: Path) -> None:
    """Remove what killed saves left; a checkpoint whose successor did not come is put back."""
    for path in (run_dir / "checkpoints").glob(f"{REPLACED}*"):
        original = path.with_name(path.name.removeprefix(REPLACED))
        if not original.exists():
            path.rename(original)
    for path in (run_dir / "checkpoints").glob(f"{STAGING}*"):
        shutil.rmtree(path)


def commit(staging: Path, step: int, files: dict[str, Entry], *, best: bool) -> Path:
    """Write the manifest and move the complete folder into place; then point `latest`, and `best`, to it."""
    write_manifest(staging, files, best=best)
    sync(staging)
    folder = staging.parent
    final = folder / folder_name(step)
    replaced = folder / f"{REPLACED}{final.name}"
    if final.exists():  # The same step saved once more, e.g. with the evaluation that an interrupted run still owed.
        final.rename(replaced)
    staging.rename(final)
    sync(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    point(folder.parent)
    return final


def point(run_dir: Path) -> None:
    """Make `latest` and `best` name the newest checkpoint and the newest of those that were the best when saved.

    Done after every save, and at every start for a save that was killed before it came to this.
    """
    complete = checkpoints_of(run_dir)
    best = [path for path in complete if was_best(path)]
    for name, found in (("latest", complete), ("best", best)):
        pointer = run_dir / "checkpoints" / name
        if not found:
            pointer.unlink(missing_ok=True)
        elif _pointer(run_dir, name) != found[-1].name:
            write_atomic(pointer, found[-1].name.encode())


def was_best(checkpoint: Path) -> bool:
    """Whether its evaluation was the best so far when it was saved."""
    try:
        return read_manifest(checkpoint)["best"] is True
    except UserError:
        return False  # Of another version: whoever loads it is told.


def set_aside(checkpoint: Path) -> Path:
    """Give a damaged checkpoint a name under which nothing looks for it, and say which; nothing of it is removed."""
    number, aside = 1, checkpoint.with_name(f"{checkpoint.name}.damaged")
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged-{number}")
    checkpoint.rename(aside)
    sync(checkpoint.parent)
    return aside


def prune(run_dir: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints and the best one."""
    best = best_checkpoint(run_dir)
    for old in checkpoints_of(run_dir)[:-keep_last]:
        if old != best:
            # Renamed first: a removal that is killed half-way leaves no checkpoint that looks complete.
            doomed = old.with_name(f"{STAGING}removed-{old.name}")
            old.rename(doomed)
            shutil.rmtree(doomed)


def move_aside(run_dir: Path) -> None:
    """Start anew: checkpoints, metrics and samples get a number and stay."""
    number = 1
    while any((run_dir / f"{name}.moved-{number}").exists() for name in _MOVED):
        number += 1
    for name in _MOVED:
        if (run_dir / name).exists():
            (run_dir / name).rename(run_dir / f"{name}.moved-{number}")


_MOVED = ("checkpoints", "metrics.jsonl", "micro_batch.json", "samples", "wandb")


def _pointer(run_dir: Path, name: str) -> str | None:
    file = run_dir / "checkpoints" / name
    return file.read_text().strip() if file.is_file() else None

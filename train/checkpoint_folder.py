"""The folder `checkpoints/`: complete or absent, verified, retained by rule. Knows files, nothing of tensors.

checkpoints/step-00000100/   manifest.json names every other file with its size and hash
checkpoints/latest, best     a folder's name as text
checkpoints/.staging-…       a save under way; what a killed save left is removed at the next start
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from crossguard.configs.errors import UserError
from crossguard.data.shards.files import sync, write_atomic

FORMAT = 2
STAGING = ".staging-"
MANIFEST = "manifest.json"
STATE = "state.json"


def checkpoints_of(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run directory, oldest first."""
    folder = run_dir / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else iter(())
    return sorted(path for path in found if re.fullmatch(r"step-\d{8,}", path.name) and (path / MANIFEST).is_file())


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint, or None in a run directory without one."""
    return max(checkpoints_of(run_dir), key=step_of, default=None)


def best_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint whose evaluation was the best, or None when there was no evaluation."""
    name = _pointer(run_dir, "best")
    return run_dir / "checkpoints" / name if name and (run_dir / "checkpoints" / name / MANIFEST).is_file() else None


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
        UserError: the file cannot be read.
    """
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{checkpoint / STATE}: unreadable ({error}); remove this checkpoint to use an older one"
        ) from None
    if state.get("format") != FORMAT:
        raise UserError(
            f"{checkpoint / STATE}: format {state.get('format')}, this version of crossguard reads {FORMAT}"
        )
    return state


def verify(checkpoint: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        UserError: names the first file that is missing, truncated or altered.
    """
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text())["files"]
        files = {name: (int(entry["size"]), str(entry["blake2b"])) for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint / MANIFEST}: unreadable ({error}); {_REMEDY}") from None
    for name, (size, content) in files.items():
        file = checkpoint / name
        if not file.is_file():
            raise UserError(f"{file}: missing; {_REMEDY}")
        if file.stat().st_size != size:
            raise UserError(f"{file}: {file.stat().st_size} bytes, the manifest says {size}; {_REMEDY}")
        if digest(file) != content:
            raise UserError(f"{file}: its content is not what the manifest says; {_REMEDY}")


_REMEDY = "remove this checkpoint to use an older one, or set train.restart=true"


def open_staging(run_dir: Path, step: int) -> Path:
    """A new folder for a save; its remains from a killed one are removed."""
    staging = run_dir / "checkpoints" / f"{STAGING}{folder_name(step)}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def remove_staging(run_dir: Path) -> None:
    """Remove what killed saves left."""
    for path in (run_dir / "checkpoints").glob(f"{STAGING}*"):
        shutil.rmtree(path)


def commit(staging: Path, step: int, files: dict[str, dict[str, Any]], *, best: bool) -> Path:
    """Write the manifest and move the complete folder into place; then point `latest`, and `best`, to it."""
    manifest = staging / MANIFEST
    content = json.dumps({"format": FORMAT, "best": best, "files": dict(sorted(files.items()))}, indent=1)
    write_atomic(manifest, content.encode())
    sync(staging)
    folder = staging.parent
    final = folder / folder_name(step)
    if final.exists():  # The same step saved once more, after its checkpoint was left behind by an older run.
        shutil.rmtree(final)
    staging.rename(final)
    sync(folder)
    point(folder.parent)
    return final


def point(run_dir: Path) -> None:
    """Make `latest` and `best` name the newest checkpoint and the newest of those that were the best when saved.

    Done after every save, and at every start for a save that was killed before it came to this.
    """
    complete = checkpoints_of(run_dir)
    best = [path for path in complete if _was_best(path)]
    for name, found in (("latest", complete), ("best", best)):
        pointer = run_dir / "checkpoints" / name
        if not found:
            pointer.unlink(missing_ok=True)
        elif _pointer(run_dir, name) != found[-1].name:
            write_atomic(pointer, found[-1].name.encode())


def _was_best(checkpoint: Path) -> bool:
    try:
        return json.loads((checkpoint / MANIFEST).read_text()).get("best") is True
    except (ValueError, AttributeError):
        return False  # Damaged: whoever loads it is told.


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


_MOVED = ("checkpoints", "metrics.jsonl", "samples", "wandb")


def file_entry(file: Path) -> dict[str, Any]:
    """A file's line in the manifest."""
    return {"size": file.stat().st_size, "blake2b": digest(file)}


def digest(file: Path) -> str:
    """BLAKE2b (RFC 7693) of a file, 256 bits in hex."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _pointer(run_dir: Path, name: str) -> str | None:
    file = run_dir / "checkpoints" / name
    return file.read_text().strip() if file.is_file() else None

"""Saving and restoring everything that a resumed run needs, in a format without ranks and without ZeRO stages.

fragments-00000.safetensors   what each rank wrote: flat pieces of fp32 weights and AdamW's moments, by kind:start:name
random-00000.json             the random generators of each rank
state.json                    step, position, configuration, shapes and whatever the loop counts
refused.npy                   the samples that are not read any more

A rank that loads copies the ranges that it holds from whichever files have them, so any number of ranks and any stage
go on from any other. No pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from crossguard.configs.errors import CrossguardError, JobError, UserError
from crossguard.data.shards.files import sync, write_atomic
from crossguard.train import checkpoint_folder as folder
from crossguard.train.checkpoint_folder import best_or_latest
from crossguard.train.fragments import (
    WEIGHT,
    Fragment,
    held_fragments,
    optimizer_steps,
    owned_fragments,
    refresh_weights,
    set_optimizer_steps,
    tensor_shapes,
)
from crossguard.train.random_state import random_state, seed_rank, set_random_state
from crossguard.train.ranks import Ranks

if TYPE_CHECKING:  # load_weights must not cost the import of DeepSpeed.
    from crossguard.train.engine import Engine

__all__ = ["best_or_latest", "load_checkpoint", "load_weights", "newest_valid", "save_checkpoint"]


def save_checkpoint(
    run_dir: Path,
    engine: Engine,
    state: dict[str, Any],
    attached: Mapping[str, bytes],
    *,
    keep_last: int,
    best: bool = False,
) -> None:
    """Save the state after step `state["step"]`; all ranks call it.

    Args:
        run_dir: the run directory.
        engine: whose weights and moments are saved.
        state: what the loop counts, as JSON; the same on every rank.
        attached: further files, by name; the same on every rank.
        keep_last: how many of the newest checkpoints stay.
        best: this state's evaluation is the best so far.

    Raises:
        JobError: a rank could not write (a full disk); earlier checkpoints are untouched.
    """
    ranks = engine.ranks
    staging: Path = ranks.on_first(lambda: folder.open_staging(run_dir, state["step"]))
    error: Exception | None = None
    entries: dict[str, Any] = {}
    try:
        entries = _write_rank(staging, engine)
        if ranks.is_first:
            about = {
                "format": folder.FORMAT,
                "world_size": ranks.world_size,
                "zero_stage": engine.stage,
                "optimizer_steps": optimizer_steps(engine),
                "model": model_fingerprint(engine.model),
                "shapes": tensor_shapes(engine.model),
            }
            for name, content in {folder.STATE: json.dumps(about | state).encode(), **attached}.items():
                write_atomic(staging / name, content)
                entries[name] = folder.file_entry(staging / name)
    except (OSError, SafetensorError) as failed:
        error = JobError(f"{staging}: rank {ranks.rank} cannot save ({failed}); free space, then start again to resume")
    everyone = ranks.gather((error, entries))
    failures = [failure for failure, _ in everyone if failure is not None]
    if failures:
        if ranks.is_first:
            shutil.rmtree(staging, ignore_errors=True)
        raise failures[0]
    files = {name: entry for _, written in everyone for name, entry in written.items()}
    ranks.on_first(lambda: _commit(run_dir, staging, state["step"], files, keep_last, best))


def newest_valid(run_dir: Path, ranks: Ranks) -> Path | None:
    """The checkpoint to go on from, verified by rank 0 and agreed on by all, or None in a fresh run directory.

    Raises:
        UserError: it is damaged; the message names the file.
    """

    def choose() -> Path | None:
        newest = folder.latest_checkpoint(run_dir)
        if newest is not None:
            folder.verify(newest)
        return newest

    return ranks.on_first(choose)


def load_checkpoint(checkpoint: Path, engine: Engine, seed: int) -> dict[str, Any]:
    """Restore weights, moments and random generators from a verified checkpoint; all ranks call it.

    Args:
        checkpoint: the folder.
        engine: a fresh engine of the same model, on any number of ranks and in any stage.
        seed: seeds the generators of ranks that the saving run did not have.

    Returns:
        The state that `save_checkpoint` was given.

    Raises:
        UserError: the checkpoint is of another model.
    """
    ranks = engine.ranks
    state = folder.read_state(checkpoint)
    _check_model(checkpoint, state, engine)
    error: Exception | None = None
    try:
        _fill(checkpoint, held_fragments(engine))
        random_file = checkpoint / _random_name(ranks.rank)
        if random_file.is_file() and state["world_size"] == ranks.world_size:
            set_random_state(json.loads(random_file.read_text()))
        else:
            seed_rank(seed + state["step"], ranks.rank)
    except (CrossguardError, OSError) as failed:
        error = failed
    except SafetensorError as failed:
        error = UserError(f"{checkpoint}: unreadable ({failed}); remove this checkpoint to use an older one")
    ranks.agree(error)
    set_optimizer_steps(engine, state["optimizer_steps"])
    refresh_weights(engine)
    return state


def load_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every parameter (fp32) and buffer of a checkpoint, whole, on the CPU; needs one process and no DeepSpeed.

    Raises:
        UserError: the checkpoint is damaged or incomplete.
    """
    folder.verify(checkpoint)
    shapes: dict[str, list[int]] = folder.read_state(checkpoint)["shapes"]
    whole: dict[str, torch.Tensor] = {}
    seen: dict[str, int] = defaultdict(int)
    for _, start, name, part in _stored(checkpoint, {WEIGHT}):
        if name not in whole:
            whole[name] = torch.empty(shapes[name], dtype=part.dtype)
        whole[name].view(-1)[start : start + part.numel()] = part
        seen[name] += part.numel()
    for name, shape in shapes.items():
        if seen[name] != torch.Size(shape).numel():
            raise UserError(f"{checkpoint}: '{name}' is incomplete")
    return {name: whole.get(name, torch.empty(shape)) for name, shape in shapes.items()}


def model_fingerprint(model: torch.nn.Module) -> str:
    """A hash of the names and shapes of all parameters and buffers."""
    return hashlib.blake2b(json.dumps(tensor_shapes(model), sort_keys=True).encode(), digest_size=16).hexdigest()


def _write_rank(staging: Path, engine: Engine) -> dict[str, Any]:
    """Write this rank's files; name -> entry of the manifest."""
    rank = engine.ranks.rank
    fragments = staging / f"fragments-{rank:05d}.safetensors"
    # Fragments are views of shared buffers, which safetensors refuses: each gets memory of its own.
    save_file(
        {f"{part.kind}:{part.start}:{part.name}": part.tensor.cpu().clone() for part in owned_fragments(engine)},
        fragments,
    )
    sync(fragments)
    write_atomic(staging / _random_name(rank), json.dumps(random_state()).encode())
    return {file.name: folder.file_entry(file) for file in (fragments, staging / _random_name(rank))}


def _commit(
    run_dir: Path, staging: Path, step: int, files: dict[str, dict[str, Any]], keep_last: int, best: bool
) -> None:
    try:
        folder.commit(staging, step, files, best=best)
        folder.prune(run_dir, keep_last)
    except OSError as failed:
        raise JobError(f"{staging}: cannot finish the checkpoint ({failed}); start again to resume") from failed


def _stored(checkpoint: Path, kinds: set[str]) -> Iterator[tuple[str, int, str, torch.Tensor]]:
    """(kind, start, name, elements) of everything stored of some kinds."""
    for file in sorted(checkpoint.glob("fragments-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                kind, start, name = key.split(":", 2)
                if kind in kinds:
                    yield kind, int(start), name, opened.get_tensor(key)


def _fill(checkpoint: Path, fragments: list[Fragment]) -> None:
    """Copy from the files the ranges that this rank holds."""
    wanted: dict[tuple[str, str], list[Fragment]] = defaultdict(list)
    for fragment in fragments:
        wanted[fragment.kind, fragment.name].append(fragment)
    missing = sum(fragment.tensor.numel() for fragment in fragments)
    for file in sorted(checkpoint.glob("fragments-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                kind, start, name = key.split(":", 2)
                for fragment in wanted[kind, name]:
                    missing -= _copy_overlap(opened.get_slice(key), int(start), fragment)
    if missing:
        raise UserError(
            f"{checkpoint}: {missing} elements that this model needs are not in it; is it of another model?"
        )


def _copy_overlap(stored: Any, start: int, fragment: Fragment) -> int:
    """Copy what a stored piece [start, …) and a held fragment share; returns how many elements."""
    low = max(start, fragment.start)
    high = min(start + stored.get_shape()[0], fragment.start + fragment.tensor.numel())
    if low >= high:
        return 0
    fragment.tensor[low - fragment.start : high - fragment.start].copy_(stored[low - start : high - start])
    return high - low


def _check_model(checkpoint: Path, state: dict[str, Any], engine: Engine) -> None:
    if state["model"] == model_fingerprint(engine.model):
        return
    now, then = tensor_shapes(engine.model), state["shapes"]
    name = min(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    raise UserError(
        f"{checkpoint}: of another model: '{name}' is {then.get(name, 'absent')} there and {now.get(name, 'absent')} in"
        " this configuration; use the model it was trained with, or train.restart=true"
    )


def _random_name(rank: int) -> str:
    return f"random-{rank:05d}.json"

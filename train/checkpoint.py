"""Restoring everything that a resumed run needs, from a format without ranks and without ZeRO stages.

fragments-00000.safetensors   what each rank wrote: flat pieces of fp32 weights, averages, moments, by kind:start:name
random-00000.json             the random generators of each rank
state.json                    step, position, configuration, shapes and whatever the loop counts
refused.npy                   the samples that are not read any more

A rank that loads copies the ranges that it holds from whichever files have them, so any number of ranks and any stage
go on from any other. No pickle is written or read.
"""

from __future__ import annotations

import functools
import json
import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from crossguard.configs.errors import CrossguardError, UserError
from crossguard.train import checkpoint_folder as folder
from crossguard.train.checkpoint_manifest import DamagedCheckpoint, fragment_files, verify
from crossguard.train.fragments import (
    Fragment,
    held_blocks,
    model_fingerprint,
    refresh_weights,
    set_optimizer_steps,
    tensor_shapes,
)
from crossguard.train.random_state import random_name, seed_rank, set_random_state
from crossguard.train.ranks import Ranks

if TYPE_CHECKING:  # load_weights must not cost the import of DeepSpeed.
    from crossguard.train.engine import Engine


def newest_valid(run_dir: Path, ranks: Ranks) -> Path | None:
    """The newest checkpoint of which every file is whole, agreed on by all ranks, or None in a fresh run directory.

    Damaged ones are named, and set aside once a whole one is found.

    Raises:
        UserError: none is whole; the message says what is wrong with each.
    """
    return _first_valid(run_dir, ranks, lambda: folder.checkpoint_folders(run_dir)[::-1])


def best_valid(run_dir: Path, ranks: Ranks) -> Path:
    """The checkpoint that is evaluated and exported: like `best_or_latest`, but every file of it is whole.

    Raises:
        UserError: there is no checkpoint, or none that is whole.
    """

    def candidates() -> list[Path]:
        """What `best` names, then the others in the order in which they would follow it."""
        named, others = folder.named_best(run_dir), folder.checkpoint_folders(run_dir)
        others.sort(key=lambda path: (folder.was_best(path), folder.step_of(path)), reverse=True)
        return list(dict.fromkeys([*([named] if named else []), *others]))

    return _first_valid(run_dir, ranks, candidates) or folder.best_or_latest(run_dir)


def _first_valid(run_dir: Path, ranks: Ranks, candidates: Callable[[], list[Path]]) -> Path | None:
    """The first of the candidates that is whole; each rank reads its share of the files."""
    damaged: dict[Path, DamagedCheckpoint] = {}
    every = ranks.on_first(candidates)
    valid = None
    for checkpoint in every:
        problem = _damage(checkpoint, ranks)
        if problem is None:
            valid = checkpoint
            break
        damaged[checkpoint] = problem
    if valid is None:
        if not damaged:
            return None
        raise UserError(
            f"{run_dir / 'checkpoints'}: every checkpoint is damaged ({'; '.join(map(str, damaged.values()))}); put"
            " back a copy of one that is not, or begin anew with train.restart=true"
        )
    for checkpoint, problem in damaged.items():
        aside: Path = ranks.on_first(functools.partial(folder.set_aside, checkpoint))
        warning = f"warning: {problem}; kept as {aside.name}, {valid.name} is used instead"
        # At this level it goes to the log of a rank, where there is one, and not to the terminal a second time.
        logging.getLogger(__name__).info(warning)
        ranks.say(warning)
    if damaged:
        ranks.on_first(lambda: folder.point(run_dir))
    return valid


def _damage(checkpoint: Path, ranks: Ranks) -> DamagedCheckpoint | None:
    """What the ranks together find damaged; the lowest rank's, when several do."""
    damage: DamagedCheckpoint | None = None
    refusal: UserError | None = None
    try:
        verify(checkpoint, ranks.rank, ranks.world_size)
    except DamagedCheckpoint as error:
        damage = error
    except UserError as error:  # Of another version.
        refusal = error
    ranks.agree(refusal)
    return next((found for found in ranks.gather(damage) if found is not None), None)


def load_checkpoint(checkpoint: Path, engine: Engine, seed: int) -> dict[str, Any]:
    """Restore weights, moments and random generators from a verified checkpoint; all ranks call it.

    Args:
        checkpoint: the folder.
        engine: a fresh engine of the same model, on any number of ranks and in any stage.
        seed: seeds the generators of ranks that the saving run did not have.

    Returns:
        The state that `CheckpointSaver.save` was given.

    Raises:
        UserError: the checkpoint is of another model.
    """
    ranks = engine.ranks
    state = folder.read_state(checkpoint)
    _check_model(checkpoint, state, engine)
    error: Exception | None = None
    try:
        for block in held_blocks(engine, changed=True):
            _fill(checkpoint, block)
        random_file = checkpoint / random_name(ranks.rank)
        if random_file.is_file() and state["world_size"] == ranks.world_size:
            set_random_state(json.loads(random_file.read_text()))
        else:
            seed_rank(seed + state["step"], ranks.rank)
    except (CrossguardError, OSError) as failed:
        error = failed
    except SafetensorError as failed:
        error = UserError(f"{checkpoint}: unreadable ({failed}); start again to use an older one")
    ranks.agree(error)
    set_optimizer_steps(engine, state["optimizer_steps"])
    refresh_weights(engine)
    return state


def _fill(checkpoint: Path, fragments: list[Fragment]) -> None:
    """Copy from the files the ranges that this rank holds."""
    wanted: dict[tuple[str, str], list[Fragment]] = defaultdict(list)
    for fragment in fragments:
        wanted[fragment.kind, fragment.name].append(fragment)
    missing = sum(fragment.tensor.numel() for fragment in fragments)
    for file in fragment_files(checkpoint):
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

"""Run on 2 ranks by test_checkpoint.py: save in every stage, go on bit for bit, and load in every other stage."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from rank_models import TinyModel, batch_of_step, masked_sum, tiny_config

from crossguard.configs.parent_death import die_with_parent
from crossguard.train.checkpoint import load_checkpoint
from crossguard.train.checkpoint_folder import latest_checkpoint
from crossguard.train.checkpoint_saving import CheckpointSaver
from crossguard.train.engine import Engine
from crossguard.train.fragments import held_blocks
from crossguard.train.ranks import Ranks, end_process, init_ranks


def new_engine(ranks: Ranks, stage: int, precision: str = "fp32", seed: int = 0) -> Engine:
    """A fresh engine around `TinyModel`."""
    return Engine(TinyModel(seed), tiny_config(stage, precision), ranks, 16 // ranks.world_size)


def train(engine: Engine, steps: range) -> list[float]:
    """This rank's part of the losses of some steps."""
    losses, size = [], 16 // engine.ranks.world_size
    for step in steps:
        inputs, labels = batch_of_step(step)
        mine = slice(engine.ranks.rank * size, (engine.ranks.rank + 1) * size)
        loss = masked_sum(engine(inputs[mine]), labels[mine]) / (~labels.isnan()).sum()
        engine.backward(loss)
        losses.append(float(loss.detach()))
        engine.step(1e-2)
    return losses


def save(engine: Engine, run_dir: Path, step: int, *, in_background: bool = False) -> Path:
    """Save and say where."""
    with CheckpointSaver(run_dir, engine, keep_last=1, in_background=in_background) as saver:
        saver.save(counts(step), {})
    newest = latest_checkpoint(run_dir)
    assert newest is not None
    return newest


def counts(step: int) -> dict[str, object]:
    """What the loop would count."""
    return {"step": step, "config": {}}


def checkpoint_of(root: Path, case: str) -> Path:
    """The one that all of these jobs save."""
    return root / case / "checkpoints" / "step-00000002"


def held(engine: Engine) -> dict[tuple[str, str, int], torch.Tensor]:
    """A copy of everything that the rank holds."""
    blocks = held_blocks(engine)
    return {(part.kind, part.name, part.start): part.tensor.clone() for block in blocks for part in block}


def same(one: dict[tuple[str, str, int], torch.Tensor], other: dict[tuple[str, str, int], torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def main(folder: str) -> None:
    """Write what was found, by name of the check."""
    die_with_parent()
    ranks, root, found = init_ranks(), Path(folder), {}
    for precision in ("fp32", "bf16"):
        for stage in range(4):
            case = f"{precision}-{stage}"
            engine = new_engine(ranks, stage, precision)
            train(engine, range(1, 3))
            checkpoint = save(engine, root / case, 2)
            with CheckpointSaver(root / f"{case}-async", engine, keep_last=2, in_background=True) as saver:
                saver.save(counts(2), {})
                losses = train(engine, range(3, 5))
                saver.save(counts(4), {})
            resumed = new_engine(ranks, stage, precision, seed=9)
            load_checkpoint(checkpoint, resumed, seed=0)
            found[f"{case} same losses"] = train(resumed, range(3, 5)) == losses
            found[f"{case} same state"] = same(held(engine), held(resumed))
            engine.close()
            resumed.close()
    ranks.on_first((root / "saved").touch)
    while not (root / "alone-done").exists():
        time.sleep(0.1)
    for saved in range(4):
        engine = new_engine(ranks, (saved + 2) % 4, seed=9)
        load_checkpoint(checkpoint_of(root, f"{saved}-alone"), engine, seed=0)
        save(engine, root / f"{saved}-alone-2", 2)
        engine.close()
    for saved in range(4):
        for stage in range(4):
            other = new_engine(ranks, stage, seed=9)
            load_checkpoint(checkpoint_of(root, f"fp32-{saved}"), other, seed=0)
            save(other, root / f"{saved}-to-{stage}", 2)
            logits = other(batch_of_step(9)[0])
            found[f"{saved} to {stage} logits"] = float(logits.sum())
            other.close()
    answers = ranks.gather(found)
    if ranks.is_first:
        (root / "found.json").write_text(json.dumps(answers, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
    end_process(0)

"""Steps that must change nothing, in every ZeRO stage: run on 2 ranks by test_guards.py, and by the test itself on one."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import own_losses
import torch
from own_losses import Change, infinite_gradient, second_is_nan
from rank_checkpoint import held, same
from rank_models import TinyModel, batch_of_step, masked_sum, tiny_config
from rank_refusals import outcome
from rank_training import arguments

from crossguard.configs.parent_death import die_with_parent
from crossguard.train.engine import Engine
from crossguard.train.fragments import optimizer_steps
from crossguard.train.ranks import Ranks, end_process, init_ranks

MICRO_BATCHES = 2
STEPS = 8
PLANNED = ["train.loss.name=own_losses:planned", "train.schedule_steps=8", "evaluation.every_steps=0"]
# The steps in which one sample's loss, and all gradients of a rank, are not finite.
BAD_LOSS, BAD_GRADIENT = 3, 5
# What is done to the last loss of the last rank, and whether the engine is told that the first rank's loss is not a number.
BAD: dict[str, tuple[Change, bool]] = {
    "finite gradients, skipped": (lambda loss: loss, True),
    "loss is nan": (lambda loss: loss * math.nan, True),
    "gradient is nan": (lambda loss: own_losses.Backward.apply(loss, math.nan), False),
    "gradient is infinite": (infinite_gradient, False),
}


def tiny_engine(ranks: Ranks, stage: int, precision: str) -> Engine:
    """Weights, moments and averages."""
    config = tiny_config(stage, precision, ema_decay=0.9)
    return Engine(TinyModel(), config, ranks, 16 // ranks.world_size // MICRO_BATCHES)


def one_step(engine: Engine, number: int, change: Change = lambda loss: loss, skip: bool = False) -> float:
    """A step on this rank's slice of a batch, in micro-batches; the norm of its gradient."""
    ranks = engine.ranks
    inputs, labels = batch_of_step(number)
    mine = slice(ranks.rank * 16 // ranks.world_size, (ranks.rank + 1) * 16 // ranks.world_size)
    parts = list(zip(inputs[mine].chunk(MICRO_BATCHES), labels[mine].chunk(MICRO_BATCHES), strict=True))
    for index, (part, truth) in enumerate(parts):
        loss = masked_sum(engine(part), truth) / (~labels.isnan()).sum()
        last = ranks.rank == ranks.world_size - 1 and index == len(parts) - 1
        engine.backward(change(loss) if last else loss)
    told = torch.tensor([math.nan if skip and ranks.is_first else 1.0, 1.0], dtype=torch.float64)
    norm, (_, sums) = engine.step(1e-2, told)
    assert sums == ranks.world_size
    return norm


def engine_after_bad_steps(ranks: Ranks, stage: int, precision: str) -> dict[str, bool]:
    """Each kind of bad step before the first good one and after it: whether it left everything as it was, bit for bit,
    and was known for what it is on all ranks; and whether the good ones did what they do without any bad one."""
    found = {}
    engine, only_good = tiny_engine(ranks, stage, precision), tiny_engine(ranks, stage, precision)
    for good in (1, 2):
        for name, (change, skip) in BAD.items():
            before, steps = held(engine), optimizer_steps(engine)
            norms = ranks.gather(one_step(engine, 9, change, skip))
            unchanged = same(before, held(engine)) and optimizer_steps(engine) == steps
            told = math.isfinite(norms[0]) == name.startswith("finite") and len({repr(norm) for norm in norms}) == 1
            found[f"{name}, before good step {good}"] = all(ranks.gather(unchanged and told))
        one_step(engine, good)
        one_step(only_good, good)
        found[f"good step {good}"] = all(ranks.gather(same(held(only_good), held(engine))))
    engine.close()
    only_good.close()
    return found


def train(
    job: list[str], ranks: Ranks, bad: dict[int, tuple[int, Change]], first_step: int = 1, micro_batches: int = 4
) -> tuple[str, str]:
    """Train with losses that are changed in the second micro-batch (or the only one) of step -> (rank, change): how it
    ended, and what was said."""
    passes = micro_batches // ranks.world_size
    mine = {step: change for step, (rank, change) in bad.items() if rank % ranks.world_size == ranks.rank}
    own_losses.plan({(step - first_step) * passes + min(1, passes - 1): change for step, change in mine.items()})
    with contextlib.redirect_stderr(io.StringIO()) as said:
        ended = outcome(job, ranks)
    return ended, said.getvalue()


def trained_with_bad_steps(folder: Path, ranks: Ranks, stage: int) -> tuple[str, str]:
    """A loss that is not finite on the last rank, later a gradient that is not on the first."""
    steps = [f"train.max_steps={STEPS}", "checkpoint.every_steps=0", "train.log_every=4"]
    job = arguments(folder, f"bad-{ranks.world_size}-{stage}", f"zero={stage}", *PLANNED, *steps)
    return train(job, ranks, {BAD_LOSS: (-1, second_is_nan), BAD_GRADIENT: (0, infinite_gradient)})


def given_up(folder: Path, ranks: Ranks) -> list[tuple[str, str]]:
    """Bad steps up to a checkpoint, and one more after it."""
    settings = [*PLANNED, "train.max_skipped_steps=3", "checkpoint.every_steps=2"]
    bad = dict.fromkeys((1, 3, 4, 5), (-1, second_is_nan))
    jobs = [arguments(folder, f"stopped-{ranks.world_size}", *settings, f"train.max_steps={last}") for last in (4, 8)]
    return [train(jobs[0], ranks, bad), train(jobs[1], ranks, bad, first_step=5)]


def find(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """All of it on these ranks."""
    kinds = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
    return {
        "engine": {
            f"{precision} {stage}": engine_after_bad_steps(ranks, stage, precision) for stage, precision in kinds
        },
        "trained": [trained_with_bad_steps(folder, ranks, stage) for stage in range(4)],
        "given up": given_up(folder, ranks),
    }


def main(folder: Path, jobs: list[list[str]]) -> None:
    """Train some jobs as they are; then write what each rank found.

    In this order: ZeRO-3 puts another `linear` in torch's place for good, which rounds the gradient of a bias otherwise.
    """
    die_with_parent()
    ranks = init_ranks()
    ended = [outcome(job, ranks) for job in jobs]
    found = {"jobs": ended, **find(folder, ranks)}
    everyone = ranks.gather(found)
    ranks.on_first(lambda: (folder / "found.json").write_text(json.dumps(everyone)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    end_process(0)

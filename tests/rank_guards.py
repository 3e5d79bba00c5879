"""Steps that must change nothing, in every ZeRO stage: run on 2 ranks by test_guards.py, and by the test itself on one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from rank_checkpoint import held, same
from rank_models import TinyModel, batch_of_step, masked_sum, tiny_config

from crossguard.train.engine import Engine
from crossguard.train.fragments import optimizer_steps
from crossguard.train.ranks import Ranks

MICRO_BATCHES = 2


class Backward(torch.autograd.Function):
    """Passes a loss on as it is, and multiplies its gradient."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, loss: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return loss.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient[0] * ctx.factor, None  # type: ignore[attr-defined]


# What is done to the loss of one micro-batch on one rank, and whether the step is skipped for its loss.
BAD: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], bool]] = {
    "finite gradients, skipped": (lambda loss: loss, True),
    "loss is nan": (lambda loss: loss * math.nan, True),
    "gradient is nan": (lambda loss: Backward.apply(loss, math.nan), False),
    "gradient is infinite": (lambda loss: Backward.apply(loss, math.inf), False),
}


def one_step(
    engine: Engine,
    number: int,
    change: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
    skip: bool = False,
) -> float:
    """A step on this rank's slice of a batch, in micro-batches; the last rank's last loss is changed. The norm."""
    ranks = engine.ranks
    inputs, labels = batch_of_step(number)
    mine = slice(ranks.rank * 16 // ranks.world_size, (ranks.rank + 1) * 16 // ranks.world_size)
    parts = list(zip(inputs[mine].chunk(MICRO_BATCHES), labels[mine].chunk(MICRO_BATCHES), strict=True))
    for index, (part, truth) in enumerate(parts):
        loss = masked_sum(engine(part), truth) / (~labels.isnan()).sum()
        last = ranks.rank == ranks.world_size - 1 and index == len(parts) - 1
        engine.backward(change(loss) if last else loss)
    return engine.step(1e-2, skip=skip)


def what_bad_steps_change(ranks: Ranks, precision: str, stage: int) -> dict[str, object]:
    """For each kind of bad step, before the first good one and after it: what it changed, its norm; and how the engine
    differs in the end from one that had only the good ones."""
    found: dict[str, object] = {}
    engine = Engine(TinyModel(), tiny_config(stage, precision), ranks, 16 // ranks.world_size // MICRO_BATCHES)
    for good in (1, 2):
        for name, (change, skip) in BAD.items():
            before, steps = held(engine), optimizer_steps(engine)
            norm = one_step(engine, 9, change, skip)
            unchanged = same(before, held(engine)) and optimizer_steps(engine) == steps
            found[f"{name}, before good step {good}"] = (all(ranks.gather(unchanged)), ranks.gather(norm))
        one_step(engine, good)
    only_good = Engine(TinyModel(), tiny_config(stage, precision), ranks, 16 // ranks.world_size // MICRO_BATCHES)
    for good in (1, 2):
        one_step(only_good, good)
    found["good steps alone"] = all(ranks.gather(same(held(only_good), held(engine))))
    engine.close()
    only_good.close()
    return found

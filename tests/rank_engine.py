"""Run on ranks by test_engine.py: every ZeRO stage against a bare PyTorch loop over the whole batch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from rank_models import TinyModel, batch_of_step, masked_sum, tiny_config
from torch import nn

from crossguard.configs.schema.ngrams import NgramsConfig
from crossguard.train.engine import Engine
from crossguard.train.fragments import WEIGHT, held_blocks
from crossguard.train.models.ngrams import NgramTower
from crossguard.train.optimizer import build_optimizer, freeze, learning_rate
from crossguard.train.ranks import MOST_GATHERED, Ranks, end_process, init_ranks

STEPS = 4


class NgramModel(nn.Module):
    """The tower of n-grams, texts of 0 to 7 of them: a table most of whose rows no rank meets in a step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ngrams = NgramTower(NgramsConfig(buckets=60, width=9))
        self.frozen = nn.Linear(1, 1)
        self.head = nn.Linear(9, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        read = inputs > 0
        starts = read.sum(1).cumsum(0) - read.sum(1)
        logits: torch.Tensor = self.head(self.ngrams((inputs[read] * 20).int(), starts.int())[:, 0]).float()
        return logits


# Name of a case -> its model and its precision.
CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "fp32": (TinyModel, "fp32"),
    "bf16": (TinyModel, "bf16"),
    "n-grams": (NgramModel, "fp32"),
}


def reference(model: nn.Module, precision: str) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """Weights, losses and gradient norms of a bare loop on whole batches."""
    config = tiny_config()
    freeze(model, config.train.freeze)
    optimizer = build_optimizer(model, config.train)
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        inputs, labels = batch_of_step(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.train, STEPS)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(inputs)
        loss = masked_sum(logits, labels) / (~labels.isnan()).sum()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip)))
        losses.append(float(loss.detach()))
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.named_parameters()}, losses, norms


def check_norms(engine: Engine) -> None:
    """In each coming step, one talk of the ranks gives the norms, bit for bit, that DeepSpeed itself gets of several."""
    optimizer = engine.deepspeed.optimizer
    name = "_get_norm_groups" if engine.stage == 3 else "scaled_global_norm"
    ours, own = vars(optimizer)[name], getattr(type(optimizer), name)

    def checked() -> Any:
        with (
            patch.object(dist, "all_gather", wraps=dist.all_gather) as our_talk,
            patch.object(dist, "all_reduce", wraps=dist.all_reduce) as own_talk,
        ):
            norms = ours()
            assert not own_talk.called
            assert norms == own(optimizer)
        assert (our_talk.call_count, own_talk.call_count) == (int(engine.ranks.world_size > 1), 2)
        return norms

    setattr(optimizer, name, checked)


def trained(
    model: nn.Module, ranks: Ranks, stage: int, precision: str, micro_batches: int
) -> tuple[Engine, list[float], list[float]]:
    """The same through the engine: this rank's slice of each batch, in micro-batches."""
    config = tiny_config(stage, precision)
    engine = Engine(model, config, ranks, 16 // ranks.world_size // micro_batches)
    if stage:
        check_norms(engine)
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        inputs, labels = batch_of_step(step)
        known = (~labels.isnan()).sum()
        mine = slice(ranks.rank * 16 // ranks.world_size, (ranks.rank + 1) * 16 // ranks.world_size)
        total = torch.zeros(())
        for part, truth in zip(inputs[mine].chunk(micro_batches), labels[mine].chunk(micro_batches), strict=True):
            loss = masked_sum(engine(part), truth) / known
            engine.backward(loss)
            total += loss.detach()
        losses.append(float(ranks.sum(total)))
        norms.append(engine.step(learning_rate(step, config.train, STEPS))[0])
    return engine, losses, norms


def largest_difference(engine: Engine, whole: dict[str, torch.Tensor]) -> float:
    """Of this rank's weights from whole ones."""
    (block,) = held_blocks(engine)
    parameters = [part for part in block if part.kind == WEIGHT and part.name in whole]
    assert parameters
    return max(
        float((part.tensor - whole[part.name].reshape(-1)[part.start : part.start + part.tensor.numel()]).abs().max())
        for part in parameters
    )


def check_sums(ranks: Ranks) -> None:
    """Few numbers and many are summed up over ranks, in place, whatever their shape and type."""
    whole = sum(range(1, ranks.world_size + 1))
    for value in (torch.tensor(1), torch.ones(2, 3, dtype=torch.float64), torch.ones(MOST_GATHERED + 1)):
        expected = value * whole
        value *= ranks.rank + 1
        assert ranks.sum(value) is value
        assert value.equal(expected)


def main(output: str) -> None:
    """Write, for each case, how far the engine is from the bare loop."""
    ranks = init_ranks()
    check_sums(ranks)
    found = {}
    for name, (build, precision) in CASES.items():
        weights, losses, norms = reference(build(), precision)
        for stage in range(4):
            for micro_batches in (1, 4):
                engine, engine_losses, engine_norms = trained(build(), ranks, stage, precision, micro_batches)
                found[f"{name} stage {stage} micro-batches {micro_batches}"] = {
                    "weights": max(ranks.gather(largest_difference(engine, weights))),
                    "losses": max(abs(a - b) for a, b in zip(losses, engine_losses, strict=True)),
                    "norms": max(abs(a - b) for a, b in zip(norms, engine_norms, strict=True)),
                }
                engine.close()
    if ranks.is_first:
        Path(output).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
    end_process(0)

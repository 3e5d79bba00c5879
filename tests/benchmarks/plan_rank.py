"""Run on ranks by plan.py: a few steps of training under one ZeRO stage, and the most memory that a rank took."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModel  # noqa: F401  what every training imports is no part of what is predicted

from crossguard.configs.compose import compose
from crossguard.configs.parent_death import die_with_parent
from crossguard.data.loading.order import micro_batches
from crossguard.data.taxonomy import Taxonomy
from crossguard.train.engine import Engine
from crossguard.train.models import build_model
from crossguard.train.models.example import PostSize, example_batch
from crossguard.train.objectives.losses import build_loss
from crossguard.train.ranks import end_process, init_ranks
from crossguard.train.tokenizers import load_tokenizer

STEPS = 2


def resident(name: str) -> float:
    """Bytes: `VmRSS` now, `VmHWM` at most (proc_pid_status(5))."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def warm_up(job: list[str]) -> None:
    """What is imported and loaded at the first use: transformers' modules of these models, kernels, DeepSpeed's hooks."""
    tiny = [
        *("model.text.config.hidden_size=48", "model.text.config.intermediate_size=48", "model.fusion.width=48"),
        *("model.text.config.vocab_size=300", "model.image.config.hidden_size=48", "model.fusion.heads=2"),
        *("model.image.config.intermediate_size=48", "train.batch_size=2", "train.micro_batch_size=1"),
    ]
    train([*job, *tiny])


def train(job: list[str]) -> None:
    """A few steps."""
    config = compose(job)
    taxonomy = Taxonomy.from_config(config.taxonomy)
    micro_batch, accumulation = micro_batches(config.train.batch_size, ranks.world_size, config.train.micro_batch_size)
    model = build_model(config.model, taxonomy, load_tokenizer(config.model.text), config.seed)
    engine = Engine(model, config, ranks, micro_batch)
    engine.train()
    loss_of = build_loss(config.train.loss)
    batch = example_batch(config.model, len(taxonomy.names), micro_batch, PostSize.largest(config.model))
    for _ in range(STEPS):
        for _ in range(accumulation):
            logits = engine(batch)
            engine.backward(loss_of(logits, batch.labels).sum())
            del logits
        engine.step(1e-4)
    engine.close()


if __name__ == "__main__":
    die_with_parent()
    ranks = init_ranks()
    job = json.loads(sys.argv[1])
    warm_up(job)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    # The high-water mark starts again from here.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    train(job)
    most = ranks.gather(resident("VmHWM") - before)
    if ranks.is_first:
        Path(sys.argv[2]).write_text(json.dumps(most))
    torch.distributed.barrier()
    end_process(0)

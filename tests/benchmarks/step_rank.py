"""Loops in turns, on every rank: `torchrun … step_rank.py OUTPUT LOOP STAGE…`.

All train the same near-zero model on the same batch in memory, so that CPU time is that of the loop around it. LOOP is
the one that is compared; before each of its blocks of steps, simpler ones have their turn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from step_parts import (
    BLOCK,
    MOST_STEPS,
    POSTS,
    Block,
    NearZero,
    OfBatches,
    Turns,
    WithLoss,
    new_batch,
    new_config,
    write_shards,
)
from torch import nn
from torch.nn import functional as F

from crossguard.configs.schema import Config
from crossguard.data.loading.collate import Batch
from crossguard.train import phases, training
from crossguard.train.deepspeed_settings import deepspeed_config
from crossguard.train.optimizer import build_optimizer
from crossguard.train.ranks import Ranks, end_process, init_ranks

# The loop in its turns.
Loop = Callable[[Config, Ranks, Turns], None]


def bare(config: Config) -> Block:
    """A loop of plain PyTorch: forward, backward, clip, step."""
    model, batch = NearZero(), new_batch()
    optimizer = build_optimizer(model, config.train)

    def block() -> None:
        for _ in range(BLOCK):
            loss = F.binary_cross_entropy_with_logits(model(batch.input_ids), batch.labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip)
            optimizer.step()
            optimizer.zero_grad()

    return block


def raw_deepspeed(config: Config, world_size: int) -> Block:
    """https://www.deepspeed.ai/getting-started/, with the settings that crossguard gives to DeepSpeed."""
    import deepspeed

    model, batch = NearZero(), new_batch()
    settings = deepspeed_config(config, world_size, POSTS) | {"gradient_clipping": config.train.grad_clip}
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=build_optimizer(model, config.train), config=settings)

    def block() -> None:
        for _ in range(BLOCK):
            loss = F.binary_cross_entropy_with_logits(engine(batch.input_ids), batch.labels)
            engine.backward(loss)
            engine.step()

    return block


def crossguard(config: Config, ranks: Ranks, turns: Turns) -> None:
    """The whole train stage with its logs, W&B's among them; a batch in memory stands in for the loader."""

    def batches(*_: Any, **__: Any) -> Iterator[list[Batch]]:
        batch = new_batch()
        for _ in range(MOST_STEPS):
            yield [batch]

    def listen(phase: str) -> None:
        if phase == phases.DATA:  # The first of a step.
            turns.pause()
        if phase == phases.CHECKPOINT:  # The one after the last step.
            turns.end()

    ranks.on_first(lambda: write_shards(config))
    with (
        patch.object(training, "starting_model", lambda *_, **__: OfBatches()),
        patch.object(training, "TrainLoader", batches),
        phases.listening(listen),
    ):
        training.run_training(config, ranks)


def trainer(config: Config, ranks: Ranks, turns: Turns, deepspeed: dict[str, Any] | None = None) -> None:
    """https://huggingface.co/docs/transformers/main_classes/trainer"""
    from deepspeed import DeepSpeedEngine
    from transformers import Trainer, TrainerCallback, TrainingArguments

    batch = new_batch()
    columns = {"input_ids": batch.input_ids, "labels": batch.labels}

    class Pause(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.pause()

    arguments = TrainingArguments(
        output_dir=config.run_dir,
        per_device_train_batch_size=POSTS,
        max_steps=MOST_STEPS,
        use_cpu=deepspeed is None,  # With it, accelerate would drop DeepSpeed without a word.
        deepspeed=deepspeed,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trained = Trainer(
        WithLoss(),
        arguments,
        data_collator=lambda _: dict(columns),
        train_dataset=[*range(POSTS * MOST_STEPS)],  # type: ignore[arg-type]
        callbacks=[Pause()],
    )
    trained.train()
    turns.end()
    engine = trained.model_wrapped
    assert isinstance(engine, DeepSpeedEngine) == (deepspeed is not None), type(engine)
    if deepspeed is not None:
        assert (engine.zero_optimization_stage(), engine.global_steps) == (config.zero.stage, MOST_STEPS)


def trainer_with_deepspeed(config: Config, ranks: Ranks, turns: Turns) -> None:
    """https://huggingface.co/docs/transformers/deepspeed"""
    settings = deepspeed_config(config, ranks.world_size, POSTS) | {"gradient_clipping": "auto"}
    del settings["managed_gradient_accumulation"]  # The Trainer manages it.
    trainer(config, ranks, turns, settings)


def fabric(config: Config, ranks: Ranks, turns: Turns) -> None:
    """https://lightning.ai/docs/fabric/stable/fundamentals/convert.html"""
    from lightning_fabric import Fabric

    batch = new_batch()
    lightning = Fabric(accelerator="cpu", devices=1)
    lightning.launch()
    model = NearZero()
    wrapped, optimizer = lightning.setup(model, build_optimizer(model, config.train))
    for _ in range(MOST_STEPS):
        turns.pause()
        loss = F.binary_cross_entropy_with_logits(wrapped(batch.input_ids), batch.labels)
        lightning.backward(loss)
        lightning.clip_gradients(wrapped, optimizer, max_norm=config.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    turns.end()


LOOPS: dict[str, Loop] = {
    "crossguard": crossguard,
    "HF Trainer": trainer,
    "HF Trainer + DeepSpeed": trainer_with_deepspeed,
    "Lightning Fabric": fabric,
}


def main(output: str, name: str, stages: list[int]) -> None:
    """Write the CPU time a step of each, by stage and rank."""
    ranks = init_ranks()
    found = {}
    for stage in stages:
        run_dir = Path(output).parent / f"stage-{stage}-of-{ranks.world_size}"
        config = new_config(stage, ranks.world_size, run_dir)
        others = {"bare": bare(config)}
        if name == "crossguard":
            others["deepspeed"] = raw_deepspeed(config, ranks.world_size)
        turns = Turns(name, others)
        LOOPS[name](config, ranks, turns)
        found[stage] = ranks.gather(turns.counted())
    if ranks.is_first:
        Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [int(stage) for stage in sys.argv[3:]])
    end_process(0)

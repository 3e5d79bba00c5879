"""What the cases of rank_finetuning.py share: posts that lack modalities and labels, the real loop, and a bare one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from media_posts import layout, media_post
from rank_checkpoint import counts
from tiny_models import TAXONOMY, batch_of, model_config, post

from crossguard.configs.schema import Config, DataConfig, ModelConfig, TaxonomyConfig, TrainConfig, ZeroConfig
from crossguard.configs.schema.taxonomy import PolicyConfig
from crossguard.data.loading.collate import Batch
from crossguard.data.loading.encoded import EncodedSample
from crossguard.data.loading.order import micro_batches
from crossguard.data.taxonomy import Taxonomy
from crossguard.train.checkpoint_folder import latest_checkpoint
from crossguard.train.checkpoint_saving import CheckpointSaver
from crossguard.train.engine import Engine
from crossguard.train.guards import Guards
from crossguard.train.loop import TrainLoop, TrainState
from crossguard.train.models import Classifier, build_model
from crossguard.train.models.activations import checkpoint_activations
from crossguard.train.objectives.labels import LabelLoss
from crossguard.train.objectives.losses import build_loss
from crossguard.train.objectives.objective import Objective
from crossguard.train.optimizer import build_optimizer, freeze, learning_rate
from crossguard.train.ranks import Ranks
from crossguard.train.throughput import Work
from crossguard.train.tokenizers import load_tokenizer
from crossguard.train.tracking import NullTracker

STAGES = range(4)
# Tokens and images of each post. 12 posts on 2 ranks with micro_batch_size 4: two passes of 3 on each.
BOTH, TEXT, IMAGE, NOTHING = (5, 1), (9, 0), (0, 2), (0, 0)
STEPS = [
    [TEXT] * 6 + [IMAGE] * 6,
    [NOTHING] * 6 + [BOTH, TEXT, IMAGE, NOTHING, BOTH, BOTH],
    [IMAGE] * 3 + [NOTHING] * 3 + [TEXT] * 3 + [BOTH] * 3,
]
# Frames and hundredths of a second of each post, where the model looks and listens: on the second rank alone; in one pass
# of three posts alone; on the first rank.
MEDIA = [
    [(0, 0)] * 6 + [(2, 30), (0, 100), (3, 0), (0, 0), (1, 5), (4, 60)],
    [(0, 0)] * 9 + [(4, 0), (0, 20), (2, 100)],
    [(1, 10), (0, 0), (2, 0), (0, 44), (3, 7), (0, 0)] + [(0, 0)] * 6,
]
# Posts of each step without any known label: a micro-batch, a rank, all but an image and a text. The head is zero at first:
# what is below it moves from step 2 on.
UNLABELED = [range(3, 6), range(6), [*range(1, 7), *range(8, 12)]]
POSTS = 12
KEY_BIASES = ["*qkv.bias", "*key.bias", "*k_proj.bias"]


class NoRefusals:
    """No sample is damaged."""

    def take(self) -> int:
        return 0

    def check(self, damaged: int) -> None:
        assert not damaged


class NoLog:
    """Counts a step's work as `StepLog` does, and writes nothing."""

    def work(self, batches: list[Batch]) -> Work:
        return Work.of(batches, None)


def config_of(stage: int, model: ModelConfig | None = None, deepspeed: Any = None, **train: Any) -> Config:
    """Stage 3 keeps tensors below the threshold gathered: some of the model's are, some are not."""
    # Softmax cancels the bias of keys: its gradient is rounding alone, which AdamW would scale up to a step.
    settings = {"lr": 3e-3, "warmup_steps": 2, "grad_clip": 0.5, "freeze": KEY_BIASES, **train}
    settings = {"batch_size": POSTS, "micro_batch_size": 4, **settings}
    zero = {"zero_optimization": {"stage3_param_persistence_threshold": 20, **(deepspeed or {})}}
    return Config(
        recipe="tiny",
        taxonomy=TaxonomyConfig("tiny", "1", [PolicyConfig(name) for name in TAXONOMY.names]),
        data=DataConfig(source="synthetic"),
        model=model or model_config(),
        train=TrainConfig(**settings),
        zero=ZeroConfig(stage=stage, deepspeed=zero),
    )


def posts_of(step: int, model: ModelConfig | None = None) -> list[EncodedSample]:
    """The posts of a global step n ≥ 1, the same on every rank; with videos and sound where the model is for them."""
    draw = np.random.default_rng(step)
    posts = []
    for number, (tokens, images) in enumerate(STEPS[step - 1]):
        labels = draw.integers(0, 2, 2).astype(np.float32)
        labels[draw.random(2) < 0.3] = np.nan
        if number in UNLABELED[step - 1]:
            labels[:] = np.nan
        made = post(100 * step + number, tokens, images)
        if model is not None and "video" in model.modalities:
            made = media_post(model, 100 * step + number, tokens, images, *MEDIA[step - 1][number])
        posts.append(replace(made, labels=labels))
    return posts


def mine(ranks: Ranks, posts: list[EncodedSample], config: Config) -> list[Batch]:
    """This rank's micro-batches of a step's posts."""
    size, _ = micro_batches(len(posts), ranks.world_size, config.train.micro_batch_size)
    share = len(posts) // ranks.world_size
    own = posts[ranks.rank * share : (ranks.rank + 1) * share]
    return [batch_of(*own[start : start + size], **layout(config.model)) for start in range(0, share, size)]


def classifier(config: Config) -> Classifier:
    taxonomy = Taxonomy.from_config(config.taxonomy)
    model = build_model(config.model, taxonomy, load_tokenizer(config.model.text), seed=1)
    if config.train.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def loop_of(config: Config, ranks: Ranks, model: Classifier | None = None) -> TrainLoop:
    """The real loop around a fresh engine."""
    gc.freeze()  # DeepSpeed keeps what earlier engines held, and would look through all of it for garbage.
    size, _ = micro_batches(POSTS, ranks.world_size, config.train.micro_batch_size)
    engine = Engine(model or classifier(config), config, ranks, size)
    nothing: Any = None
    refusals: Any = NoRefusals()
    log: Any = NoLog()
    state = TrainState(step=0, schedule_steps=len(STEPS))
    objective = Objective(LabelLoss(build_loss(config.train.loss), len(config.taxonomy.policies)))
    return TrainLoop(
        config,
        engine,
        objective,
        [],
        state,
        last_step=len(STEPS),
        log=log,
        refusals=refusals,
        guards=Guards(config.train, state, ranks, refusals, NullTracker()),
        micro_batch=nothing,
        validate=None,
        save=nothing,
    )


def train(loop: TrainLoop, steps: range) -> list[float]:
    """The losses of some steps."""
    loop.engine.train()
    config = loop.config
    batches = [mine(loop.engine.ranks, posts_of(step, config.model), config) for step in steps]
    return [loop.train_step(step, *pair).loss for step, pair in zip(steps, pairwise([*batches, []]), strict=True)]


@contextmanager
def trained(config: Config, ranks: Ranks) -> Iterator[tuple[TrainLoop, list[float]]]:
    """A loop after all steps, and their losses."""
    torch.manual_seed(7 + ranks.rank)
    loop = loop_of(config, ranks)
    try:
        yield loop, train(loop, range(1, len(STEPS) + 1))
    finally:
        loop.engine.close()


def reference(config: Config) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
    """The weights after each step, the initial ones first, and the losses of a bare loop on whole batches."""
    model = classifier(config).train()
    freeze(model, config.train.freeze)
    optimizer, objective = (
        build_optimizer(model, replace(config.train, ema_decay=0.0)),
        build_loss(config.train.loss),
    )
    weights, losses = [copy_of(model)], []
    for step in range(1, len(STEPS) + 1):
        batch = batch_of(*posts_of(step, config.model), **layout(config.model))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.train, len(STEPS)) * group["lr_scale"]
        optimizer.zero_grad()
        loss = objective(model(batch), batch.labels).sum() / (~batch.labels.isnan()).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip)
        losses.append(float(loss.detach()))
        optimizer.step()
        weights.append(copy_of(model))
    return weights, losses


def copy_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def save(engine: Engine, run_dir: Path) -> Path:
    with CheckpointSaver(run_dir, engine, keep_last=1) as saver:
        saver.save(counts(3), {})
    newest = latest_checkpoint(run_dir)
    assert newest is not None
    return newest


@contextmanager
def count_saved() -> Iterator[list[int]]:
    """Bytes of the tensors that autograd keeps for backward passes; weights are among them in both cases."""
    counted = [0]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        counted[0] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield counted

"""What all loops of the step benchmark share: the model, the batch, the settings, and their turns."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from crossguard.configs.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    TaxonomyConfig,
    TrainConfig,
    ZeroConfig,
)
from crossguard.configs.schema.encoders import TextEncoderConfig
from crossguard.configs.schema.taxonomy import PolicyConfig
from crossguard.data.loading.collate import Batch
from crossguard.data.shards.build import build_shards

POSTS, LENGTH, WIDTH = 8, 16, 8
POLICIES = ("spam", "insult", "threat")
# Steps of a block, and blocks that count; the first only warms up.
BLOCK, ROUNDS = 25, 20
MOST_STEPS = BLOCK * (ROUNDS + 1)
Block = Callable[[], None]


class NearZero(nn.Module):
    """Next to nothing to compute."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(256, WIDTH), nn.Linear(WIDTH, len(POLICIES))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64[B, L] → float[B, P]."""
        logits: torch.Tensor = self.head(self.embedding(input_ids).mean(1))
        return logits


class OfBatches(NearZero):
    """The same, called as crossguard calls its models."""

    def forward(self, batch: Batch) -> torch.Tensor:  # type: ignore[override]
        """A batch → logits."""
        return super().forward(batch.input_ids)


class WithLoss(NearZero):
    """The same, called as the Trainer of transformers calls its models."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """Loss and logits."""
        logits = super().forward(input_ids)
        return {"loss": F.binary_cross_entropy_with_logits(logits, labels), "logits": logits}


def new_config(stage: int, world_size: int, run_dir: Path) -> Config:
    """Settings as they are by default."""
    return Config(
        recipe="benchmark",
        run_dir=str(run_dir),
        taxonomy=TaxonomyConfig("benchmark", "1", [PolicyConfig(name) for name in POLICIES]),
        data=DataConfig(path=str(run_dir / "posts.jsonl")),
        model=ModelConfig(modalities=["text"], text=TextEncoderConfig(build="none:none", tokenizer="bytes")),
        train=TrainConfig(batch_size=POSTS * world_size, max_steps=MOST_STEPS),
        checkpoint=CheckpointConfig(every_steps=0),
        evaluation=EvaluationConfig(every_steps=0),
        zero=ZeroConfig(stage=stage),
    )


def write_shards(config: Config) -> None:
    """Posts that nobody reads."""
    labels = dict.fromkeys(POLICIES, 1)
    lines = [{"id": f"post-{number}", "text": "abc", "labels": labels, "split": "train"} for number in range(64)]
    posts = Path(config.data.path or "")
    posts.parent.mkdir(parents=True)
    posts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    build_shards(config, Path(config.shards_location), posts.with_name("quarantine.jsonl"))


def new_batch() -> Batch:
    """Posts of equal length with every label known."""
    draw = torch.Generator().manual_seed(0)
    return Batch(
        ids=[f"post-{number}" for number in range(POSTS)],
        languages=["und"] * POSTS,
        positions=torch.arange(POSTS),
        input_ids=torch.randint(0, 256, (POSTS, LENGTH), generator=draw),
        text_mask=torch.ones(POSTS, LENGTH, dtype=torch.bool),
        has_text=torch.ones(POSTS, dtype=torch.bool),
        ngrams=torch.zeros(0, dtype=torch.int32),
        ngram_starts=torch.zeros(POSTS, dtype=torch.int32),
        pixels=torch.zeros(1, 3, 1, 1, dtype=torch.uint8),
        image_post=torch.full((1,), -1),
        has_image=torch.zeros(POSTS, dtype=torch.bool),
        labels=torch.randint(0, 2, (POSTS, len(POLICIES)), generator=draw).float(),
    )


class Turns:
    """CPU milliseconds a step of this process, block by block: of the compared loop, and of those that run between.

    The compared loop calls `pause` before each of its `MOST_STEPS` steps, and `end` after the last.
    """

    def __init__(self, compared: str, others: dict[str, Block]):
        self.compared, self.others = compared, others
        self.spent: dict[str, list[float]] = {name: [] for name in (compared, *others)}
        self._steps = 0
        self._since = 0.0

    def pause(self) -> None:
        """Between two blocks the others have their turn."""
        if self._steps % BLOCK == 0:
            if self._steps:
                self.end()
            for name, block in self.others.items():
                self._since = time.process_time()
                block()
                self._note(name)
            self._since = time.process_time()
        self._steps += 1

    def end(self) -> None:
        """A block of the compared loop is done."""
        self._note(self.compared)

    def counted(self) -> dict[str, list[float]]:
        """All but the blocks that only warmed up."""
        assert {len(blocks) for blocks in self.spent.values()} == {ROUNDS + 1}, self.spent
        return {name: blocks[1:] for name, blocks in self.spent.items()}

    def _note(self, name: str) -> None:
        self.spent[name].append((time.process_time() - self._since) / BLOCK * 1e3)

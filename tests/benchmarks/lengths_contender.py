"""One way to train on texts of real lengths, in a process of its own: `python lengths_contender.py FOLDER NAME`.

Trains a block of steps for each line on its standard input, and answers with the measurements of `contender.py`. Texts
are made of one letter, each as long as one of `lengths.txt`: the numbers of tokens (byte-pair encoding, 32,000 entries,
cut at 256) at 1,024 quantiles of 85,426 public posts in nine languages.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from contender import cpu_seconds
from torch import Tensor, nn
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
from crossguard.data.taxonomy import Taxonomy
from crossguard.train import phases
from crossguard.train.models import build_model
from crossguard.train.ranks import init_ranks
from crossguard.train.tokenizers import load_tokenizer
from crossguard.train.training import run_training

LENGTHS = [int(length) for length in Path(__file__).with_name("lengths.txt").read_text().split()]
# So often each length comes in an epoch.
COPIES = 4
BATCH, MAX_TOKENS, WORKERS = 32, 256, 1
# Steps of a block, and of the one before the first; four blocks are an epoch.
BLOCK, WARM_UP = 32, 8
POLICIES = ("spam", "insult", "threat")
ENDLESS = 10**6


def new_config(folder: Path) -> Config:
    """A small encoder; everything that is not named is as it is by default."""
    encoder = {"model_type": "bert", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Config(
        recipe="benchmark",
        run_dir=str(folder / f"run-{os.getpid()}"),
        taxonomy=TaxonomyConfig("benchmark", "1", [PolicyConfig(name) for name in POLICIES]),
        data=DataConfig(path=str(folder / "posts.jsonl"), shards=str(folder / "shards")),
        model=ModelConfig(
            modalities=["text"],
            text=TextEncoderConfig(
                config=encoder | {"intermediate_size": 512}, tokenizer="bytes", max_length=MAX_TOKENS
            ),
        ),
        train=TrainConfig(batch_size=BATCH, micro_batch_size=BATCH, num_workers=WORKERS, max_steps=ENDLESS),
        checkpoint=CheckpointConfig(every_steps=0),
        evaluation=EvaluationConfig(every_steps=0),
        zero=ZeroConfig(stage=0),
    )


def texts() -> list[str]:
    """As many tokens as the lengths say, with the first and the last one that the tokenizer adds."""
    return ["a" * max(1, length - 2) for length in LENGTHS * COPIES]


def prepare(folder: Path) -> None:
    """Write the posts and their shards."""
    config = new_config(folder)
    labels = {name: number % 2 for number, name in enumerate(POLICIES)}
    lines = [{"id": str(n), "text": text, "labels": labels, "split": "train"} for n, text in enumerate(texts())]
    (folder / "posts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    build_shards(config, folder / "shards", folder / "quarantine.jsonl")


class Turns:
    """Waits before each block until it is asked for, and answers after it."""

    def __init__(self) -> None:
        self._left = WARM_UP
        self._start = self._cpu = 0.0
        self._counts = False

    def pause(self) -> None:
        """Before each step; ends the process when no more blocks are asked for."""
        if self._left == 0:
            if self._counts:
                seconds = time.perf_counter() - self._start
                samples = {"samples": BLOCK * BATCH, "seconds": seconds, "cpu": cpu_seconds() - self._cpu}
                print(json.dumps(samples), flush=True)
            if not sys.stdin.readline():
                os._exit(0)
            self._left, self._counts = BLOCK, True
            self._start, self._cpu = time.perf_counter(), cpu_seconds()
        self._left -= 1


def crossguard(folder: Path, turns: Turns) -> None:
    """The whole train stage."""
    with phases.listening(lambda phase: turns.pause() if phase == phases.DATA else None):
        run_training(new_config(folder), init_ranks())


class WithLoss(nn.Module):
    """The same classifier, called as the Trainer of transformers calls its models."""

    def __init__(self, config: Config):
        super().__init__()
        tokenizer = load_tokenizer(config.model.text)
        self.classifier = build_model(config.model, Taxonomy.from_config(config.taxonomy), tokenizer, config.seed)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss and logits."""
        size = len(input_ids)
        batch = Batch(
            ids=[""] * size,
            languages=["und"] * size,
            positions=torch.arange(size),
            input_ids=input_ids,
            text_mask=attention_mask.bool(),
            has_text=torch.ones(size, dtype=torch.bool),
            ngrams=torch.zeros(0, dtype=torch.int32),
            ngram_starts=torch.zeros(size, dtype=torch.int32),
            pixels=torch.zeros(1, 3, 1, 1, dtype=torch.uint8),
            image_post=torch.full((1,), -1),
            has_image=torch.zeros(size, dtype=torch.bool),
            labels=labels,
        )
        logits = self.classifier(batch)
        return {"loss": F.binary_cross_entropy_with_logits(logits, labels), "logits": logits}


def trainer(folder: Path, turns: Turns, **arguments: Any) -> None:
    """https://huggingface.co/docs/transformers/tasks/sequence_classification, of texts that are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import (
        DataCollatorWithPadding,
        PreTrainedTokenizerFast,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    config = new_config(folder)
    tokenizer = load_tokenizer(config.model.text)
    labels = [float(number % 2) for number in range(len(POLICIES))]
    dataset = [{"input_ids": tokenizer.encode(text, MAX_TOKENS), "labels": labels} for text in texts()]
    padding = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[PAD]": 0})), pad_token="[PAD]")

    class Pause(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.pause()

    Trainer(
        WithLoss(config),
        TrainingArguments(
            output_dir=config.run_dir,
            per_device_train_batch_size=BATCH,
            max_steps=ENDLESS,
            use_cpu=True,
            dataloader_num_workers=WORKERS,
            dataloader_persistent_workers=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **arguments,
        ),
        data_collator=DataCollatorWithPadding(padding),
        train_dataset=dataset,  # type: ignore[arg-type]
        callbacks=[Pause()],
    ).train()


def main() -> None:
    """Train until standard input is closed."""
    folder, name, turns = Path(sys.argv[1]), sys.argv[2], Turns()
    if name == "crossguard":
        crossguard(folder, turns)
    elif name == "HF Trainer":
        trainer(folder, turns)
    else:
        trainer(folder, turns, train_sampling_strategy="group_by_length")


if __name__ == "__main__":
    main()

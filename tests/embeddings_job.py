"""What the tests of cached embeddings and of starting from another run share: small jobs on the same posts, and what
is compared of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from evaluation_job import MODEL, make_config

from crossguard.configs.schema import CheckpointConfig, Config, DataConfig, EvaluationConfig, TrainConfig, ZeroConfig
from crossguard.configs.schema.model import ModelConfig
from crossguard.configs.schema.ngrams import NgramsConfig
from crossguard.configs.schema.train import TextAttacksConfig
from crossguard.train.checkpoint_folder import best_or_latest
from crossguard.train.stored_weights import load_weights

# Everything that reads posts, and all but the heads.
ENCODERS, TRUNK = ["text", "image"], ["text", "image", "fusion"]
# Every kind of seam: one vector; summaries alone; summaries and tokens, with modality dropout behind it; n-grams that are
# trained beside it.
SEAMS: dict[str, tuple[ModelConfig, list[str]]] = {
    "fused": (MODEL, TRUNK),
    "summaries": (replace(MODEL, fusion=replace(MODEL.fusion, kind="gated"), modality_dropout=0.5), TRUNK),
    "tokens": (replace(MODEL, modality_dropout=0.5), TRUNK),
    "beside": (
        replace(
            MODEL,
            modalities=["text", "ngrams", "image"],
            ngrams=NgramsConfig(buckets=300),
            fusion=replace(MODEL.fusion, kind="gated"),
        ),
        ENCODERS,
    ),
}


def job(folder: Path, name: str, model: ModelConfig = MODEL, stage: int = 0, every: int = 3, **train: Any) -> Config:
    """A job on the posts of `folder`, by default of 6 steps, with an evaluation and a checkpoint every 3; 0: none on the
    way."""
    attacks = TextAttacksConfig(probability=0.5, once=True)
    settings = {"max_steps": 6, "batch_size": 8, "lr": 2e-2, "warmup_steps": 0, "num_workers": 0, "attacks": attacks}
    return make_config(
        folder / "posts",
        folder / name,
        data=DataConfig(path=str(folder / "posts"), shards=str(folder / "shards")),
        model=model,
        train=TrainConfig(log_samples=True, **{**settings, **train}),
        evaluation=EvaluationConfig(every_steps=every, batch_size=8, min_positives=2),
        checkpoint=CheckpointConfig(every_steps=every),
        zero=ZeroConfig(stage=stage),
        ablations={},
    )


def seen(config: Config) -> tuple[list[float], list[str]]:
    """The loss of each step and the metric of each evaluation; the ids of each step, over all ranks."""
    run_dir = Path(config.run_dir)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    figures = [line.get("loss", line.get("macro.average_precision")) for line in lines]
    ranks = [file.read_text().splitlines() for file in sorted((run_dir / "samples").glob("*.jsonl"))]
    steps = [[json.loads(line)["ids"] for line in parts] for parts in zip(*ranks, strict=True)]
    return figures, [post for parts in steps for ids in parts for post in ids]


def weights_of(config: Config) -> dict[str, torch.Tensor]:
    return load_weights(best_or_latest(Path(config.run_dir)))


def blocks(config: Config) -> list[Path]:
    return sorted((Path(config.run_dir) / "embeddings").rglob("*.safetensors"))

"""A tiny model with what makes ZeRO hard, random batches for it, and a start of ranks, shared by the training tests."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import torch
from rank_jobs import LONGEST, RankJob
from torch import nn

from crossguard.configs.schema import Config, DataConfig, ModelConfig, TaxonomyConfig, TrainConfig, ZeroConfig
from crossguard.configs.schema.encoders import TextEncoderConfig
from crossguard.configs.schema.taxonomy import PolicyConfig
from crossguard.train.ranks import Ranks, init_ranks

POLICIES = 3
WIDTH = 10


class TinyModel(nn.Module):
    """Two parameter groups (decay or not), a frozen part, buffers, odd sizes that no number of ranks divides."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.frozen = nn.Linear(7, 7)
        self.inner = nn.Linear(7, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("scale", torch.rand(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.head = nn.Linear(WIDTH, POLICIES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.inner(self.frozen(inputs)).relu())
        return self.head(hidden).float() * self.scale.mean()


def tiny_config(stage: int = 1, precision: str = "fp32", **train: object) -> Config:
    """A configuration for `TinyModel`."""
    settings = {"lr": 1e-2, "warmup_steps": 2, "batch_size": 16, "freeze": ["frozen.*"], "grad_clip": 0.5, **train}
    return Config(
        recipe="tiny",
        taxonomy=TaxonomyConfig("tiny", "1", [PolicyConfig(name) for name in ("a", "b", "c")]),
        data=DataConfig(source="synthetic"),
        model=ModelConfig(modalities=["text"], text=TextEncoderConfig(config={"model_type": "bert"})),
        train=TrainConfig(precision=precision, **settings),  # type: ignore[arg-type]
        # Stage 3 keeps tensors below the threshold gathered: some of the model's are, some are not.
        zero=ZeroConfig(stage=stage, deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 20}}),
    )


def batch_of_step(step: int, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [size, 7] and labels [size, POLICIES] of a global step, some labels unknown (NaN), the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(size, 7, generator=generator)
    labels = torch.randint(0, 2, (size, POLICIES), generator=generator).float()
    labels[torch.rand(size, POLICIES, generator=generator) < 0.4] = float("nan")
    return inputs, labels


@cache
def alone() -> Ranks:
    """This process as the only rank; it joins once and never leaves, since DeepSpeed cannot join twice."""
    return init_ranks()


def masked_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The summed loss over known labels."""
    known = ~labels.isnan()
    return nn.functional.binary_cross_entropy_with_logits(logits[known], labels[known], reduction="sum")


def torchrun(ranks: int, module: Path, *arguments: str) -> list[str]:
    """The command line that starts `module` on a number of ranks."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"),
        *(str(module), *arguments),
    ]


def run_ranks(ranks: int, module: Path, *arguments: str, timeout: float = LONGEST) -> str:
    """Run `module` on a number of ranks, forked, and return what it printed; fails with its output when it fails."""
    with RankJob([str(module), *arguments], ranks) as job:
        assert job.wait(timeout) == [0] * ranks, job.said()
        return job.printed

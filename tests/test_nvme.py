"""Optimizer states on NVMe (ZeRO-Infinity, arXiv 2104.07857): the steps, checkpoints and averages are those of memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from rank_checkpoint import save
from rank_models import alone, tiny_config
from torch import nn

from crossguard.configs.errors import UserError
from crossguard.train.checkpoint import load_checkpoint
from crossguard.train.engine import Engine
from crossguard.train.fragments import averaged_weights, held_fragments

WIDTH = 600


class Wide(nn.Module):
    """A parameter group of more than the megabyte from which DeepSpeed swaps it, and one of less."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.inner, self.norm, self.head = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """float[B, WIDTH] → float[B, 3]."""
        logits: torch.Tensor = self.head(self.norm(self.inner(self.frozen(inputs)).relu()))
        return logits


def new_engine(**offload: Any) -> Engine:
    """In stage 3; the averages of the weights are kept as well."""
    config = tiny_config(3, ema_decay=0.5)
    if offload:
        config.zero.deepspeed = {"zero_optimization": {"offload_optimizer": offload}}
    return Engine(Wide(), config, alone(), 16)


def train(engine: Engine, steps: range) -> list[tuple[float, float]]:
    """Loss and norm of each step."""
    found = []
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        inputs, labels = torch.randn(16, WIDTH, generator=draw), torch.rand(16, 3, generator=draw).round()
        loss = nn.functional.binary_cross_entropy_with_logits(engine(inputs), labels)
        engine.backward(loss)
        found.append((float(loss.detach()), engine.step(1e-2)[0]))
    return found


def state(engine: Engine) -> dict[tuple[str, str, int], torch.Tensor]:
    """A copy of everything that is saved."""
    return {(part.kind, part.name, part.start): part.tensor.clone() for part in held_fragments(engine)}


def same(one: dict[Any, torch.Tensor], other: dict[Any, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.fixture
def nvme(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Where states go."""
    yield {"device": "nvme", "nvme_path": str(tmp_path / "nvme")}


@pytest.mark.nvme
def test_states_on_nvme_train_as_those_in_memory_and_resume(tmp_path: Path, nvme: dict[str, str]) -> None:
    whole = new_engine()
    losses = train(whole, range(1, 5))
    with averaged_weights(whole):
        averaged = state(whole)

    engine = new_engine(**nvme)
    zero: Any = engine.deepspeed.optimizer
    assert [zero._swappable_optimizer_subgroup(group) for group in range(2)] == [True, False]
    assert train(engine, range(1, 3)) == losses[:2]
    checkpoint = save(engine, tmp_path / "of nvme", 2)
    assert train(engine, range(3, 5)) == losses[2:]
    assert same(state(engine), state(whole))
    with averaged_weights(engine):
        assert same(state(engine), averaged)
    assert same(state(engine), state(whole))
    engine.close()

    for offload in (nvme, {}):
        resumed = new_engine(**offload)
        load_checkpoint(checkpoint, resumed, seed=0)
        assert train(resumed, range(3, 5)) == losses[2:]
        assert same(state(resumed), state(whole))
        resumed.close()
    whole.close()


def test_without_the_operator_nvme_is_refused(monkeypatch: pytest.MonkeyPatch, nvme: dict[str, str]) -> None:
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    with pytest.raises(UserError, match=r"device=nvme: .*libaio"):
        new_engine(**nvme)

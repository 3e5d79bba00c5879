"""Run by test_nvme.py: training with optimizer states on NVMe beside training with them in the host's memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from rank_checkpoint import save
from rank_models import tiny_config
from torch import nn

from crossguard.configs.parent_death import die_with_parent
from crossguard.configs.schema import ZeroConfig
from crossguard.train.checkpoint import load_checkpoint
from crossguard.train.engine import Engine
from crossguard.train.fragments import averaged_weights, held_blocks
from crossguard.train.ranks import Ranks, end_process, init_ranks

# Of a layer each of two ranks holds more than the megabyte from which DeepSpeed swaps.
WIDTH = 900
POSTS = 16


class Wide(nn.Module):
    """Two sub-groups that are swapped, two that are too small for it, and frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """float[B, WIDTH] → float[B, 3]."""
        logits: torch.Tensor = self.head(self.norm(self.outer(self.inner(self.frozen(inputs)).relu())))
        return logits


def new_engine(ranks: Ranks, run_dir: Path, precision: str = "fp32", **offload: Any) -> Engine:
    """In stage 3; averages of the weights are kept as well."""
    config = tiny_config(3, precision, ema_decay=0.5)
    config.run_dir = str(run_dir)
    config.zero = ZeroConfig(3, {"zero_optimization": {"offload_optimizer": offload, "sub_group_size": 300_000}})
    return Engine(Wide(), config, ranks, POSTS // ranks.world_size)


def train(engine: Engine, steps: range) -> list[tuple[float, float]]:
    """This rank's loss and the norm in each step."""
    found, rank, size = [], engine.ranks.rank, POSTS // engine.ranks.world_size
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        inputs, labels = torch.randn(POSTS, WIDTH, generator=draw), torch.rand(POSTS, 3, generator=draw).round()
        mine = slice(rank * size, (rank + 1) * size)
        loss = nn.functional.binary_cross_entropy_with_logits(engine(inputs[mine]), labels[mine])
        engine.backward(loss / engine.ranks.world_size)
        found.append((float(loss.detach()), engine.step(1e-2)[0]))
    return found


def state(engine: Engine) -> dict[tuple[str, str, int], torch.Tensor]:
    """A copy of everything that is saved."""
    blocks = held_blocks(engine)
    return {(part.kind, part.name, part.start): part.tensor.clone() for block in blocks for part in block}


def same(one: dict[Any, torch.Tensor], other: dict[Any, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


# Precision, and how states go to NVMe and come back.
CASES: dict[str, tuple[str, dict[str, bool]]] = {
    "fp32": ("fp32", {}),
    "bf16": ("bf16", {}),
    "pipelined": ("fp32", {"pipeline_read": True, "pipeline_write": True}),
}


def compare(ranks: Ranks, folder: Path, case: str) -> dict[str, Any]:
    """Two trainings, a checkpoint of the one on NVMe, and two that go on from it."""
    (precision, pipelined), run_dir, nvme = CASES[case], folder / case, folder / "nvme"
    offload = {"device": "nvme", "nvme_path": str(nvme), **pipelined}
    whole = new_engine(ranks, run_dir, precision, device="cpu")
    losses = train(whole, range(1, 5))
    with averaged_weights(whole):
        averaged = state(whole)

    engine = new_engine(ranks, run_dir, precision, **offload)
    zero: Any = engine.deepspeed.optimizer
    found: dict[str, Any] = {
        "swapped": [zero._swappable_optimizer_subgroup(group) for group in range(len(zero.fp16_groups))],
        "first losses": train(engine, range(1, 3)) == losses[:2],
        "files": sorted({str(file.parent.relative_to(nvme)) for file in nvme.rglob("*.swp")}),
    }
    checkpoint = save(engine, run_dir, 2, in_background=True)
    ranks.any(False)  # Rank 0 is the one that completes it.
    found["fragment files"] = len(list(checkpoint.glob(f"fragments-*{ranks.rank:05d}.safetensors")))
    found["losses"] = train(engine, range(3, 5)) == losses[2:]
    found["state"] = same(state(engine), state(whole))
    with averaged_weights(engine):
        found["averages"] = same(state(engine), averaged)
    found["state after averages"] = same(state(engine), state(whole))
    engine.close()
    for name, settings in (("nvme", offload), ("memory", {"device": "cpu"})):
        resumed = new_engine(ranks, run_dir, precision, **settings)
        load_checkpoint(checkpoint, resumed, seed=0)
        found[f"losses resumed in {name}"] = train(resumed, range(3, 5)) == losses[2:]
        found[f"state resumed in {name}"] = same(state(resumed), state(whole))
        resumed.close()
    whole.close()
    return found


if __name__ == "__main__":
    die_with_parent()
    ranks = init_ranks()
    folder = Path(sys.argv[1])
    found = ranks.gather({case: compare(ranks, folder, case) for case in CASES})
    if ranks.is_first:
        (folder / "found.json").write_text(json.dumps(found))
    end_process(0)

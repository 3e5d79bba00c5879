"""Checkpoints: complete, verified, and independent of the number of ranks and of the ZeRO stage."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from rank_checkpoint import checkpoint_of, new_engine, save
from rank_models import TinyModel, alone, run_ranks
from safetensors.torch import load_file

from crossguard.configs.errors import UserError
from crossguard.train.checkpoint import load_checkpoint
from crossguard.train.fragments import WEIGHT
from crossguard.train.stored_weights import load_weights

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two ranks in every stage, loaded and saved by one rank, and by two again; and what they found."""
    root = tmp_path_factory.mktemp("checkpoints")
    with ThreadPoolExecutor(1) as beside:
        two_ranks = beside.submit(run_ranks, 2, HERE / "rank_checkpoint.py", str(root))
        while not (root / "saved").exists() and not two_ranks.done():
            time.sleep(0.1)
        if not two_ranks.done():
            for stage in range(4):
                engine = new_engine(alone(), (stage + 1) % 4, seed=9)
                load_checkpoint(checkpoint_of(root, f"fp32-{stage}"), engine, seed=0)
                save(engine, root / f"{stage}-alone", 2)
                engine.close()
        (root / "alone-done").touch()
        two_ranks.result()
    return root


def test_two_ranks_go_on_bit_for_bit(saved: Path) -> None:
    for found in json.loads((saved / "found.json").read_text()):
        same = {name: right for name, right in found.items() if isinstance(right, bool)}
        assert len(same) >= 4
        assert all(same.values()), same


def test_every_stage_loads_every_other(saved: Path) -> None:
    for before in range(4):
        original = hashes(checkpoint_of(saved, f"fp32-{before}"))
        for after in range(4):
            assert hashes(checkpoint_of(saved, f"{before}-to-{after}")) == original
    for found in json.loads((saved / "found.json").read_text()):
        logits = [value for name, value in found.items() if name.endswith("logits")]
        assert max(logits) - min(logits) < 1e-4


def test_ranks_and_stages_change_together(saved: Path) -> None:
    """2 ranks, 1 rank, 2 ranks: parameters, moments, frozen parameters and buffers have the same hashes throughout.

    DeepSpeed's own checkpoints refuse another number of ranks; its universal ones cannot change the stage, and lose
    frozen parameters without a word. Its way to moments fails with two parameter groups, with and without decay.
    """
    for stage in range(4):
        original = hashes(checkpoint_of(saved, f"fp32-{stage}"))
        assert {(WEIGHT, "frozen.weight"), (WEIGHT, "scale")} <= original.keys()
        assert {("exp_avg_sq", name) for name in ("norm.bias", "inner.weight")} <= original.keys()
        assert hashes(checkpoint_of(saved, f"{stage}-alone")) == original
        assert hashes(checkpoint_of(saved, f"{stage}-alone-2")) == original


def test_the_background_writes_the_same_bytes(saved: Path) -> None:
    for precision in ("fp32", "bf16"):
        for stage in range(4):
            ours, background = (checkpoint_of(saved, f"{precision}-{stage}{way}") for way in ("", "-async"))
            files = {file.name: file.read_bytes() for file in ours.iterdir()}
            assert files == {file.name: file.read_bytes() for file in background.iterdir()}
            assert {"fragments-00000.safetensors", "fragments-00001.safetensors"} < files.keys()


def test_load_weights_gives_a_whole_state(saved: Path) -> None:
    """What is exported. A state dict under ZeRO-3 has tensors of shape [0], and DeepSpeed's export of it writes nothing."""
    for stage in range(4):
        weights = load_weights(checkpoint_of(saved, f"fp32-{stage}"))
        missing, unexpected = TinyModel(seed=5).load_state_dict(weights, strict=True)
        assert not missing
        assert not unexpected
        assert torch.equal(weights["frozen.weight"], TinyModel().frozen.weight)
        assert torch.equal(weights["scale"], TinyModel().scale)


def test_another_model_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rank_models.WIDTH", 11)
    engine = new_engine(alone(), 0)
    with pytest.raises(UserError, match=r"'head\.weight' is \[3, 10\] there and \[3, 11\]"):
        load_checkpoint(checkpoint_of(saved, "fp32-0"), engine, seed=0)
    engine.close()


def hashes(checkpoint: Path) -> dict[tuple[str, str], str]:
    """(kind, name) -> hash of all elements, in order, straight from the files."""
    pieces: dict[tuple[str, str], list[tuple[int, bytes]]] = {}
    for file in checkpoint.glob("fragments-*.safetensors"):
        for key, part in load_file(file).items():
            kind, start, name = key.split(":", 2)
            pieces.setdefault((kind, name), []).append((int(start), part.numpy().tobytes()))
    return {key: blake3(b"".join(part for _, part in sorted(parts))).hexdigest() for key, parts in pieces.items()}

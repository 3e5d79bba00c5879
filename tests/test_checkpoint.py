"""Checkpoints: complete, verified, and independent of the number of ranks and of the ZeRO stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from rank_checkpoint import new_engine, save, train
from rank_models import TinyModel, alone, run_ranks

from crossguard.configs.errors import UserError
from crossguard.train import checkpoint_folder
from crossguard.train.checkpoint import load_checkpoint, load_weights, newest_valid
from crossguard.train.fragments import held_fragments

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of one rank (stage 1) and of two (every stage), and what two ranks found when loading them."""
    root = tmp_path_factory.mktemp("checkpoints")
    engine = new_engine(alone(), 1)
    train(engine, range(1, 3))
    save(engine, root / "alone", 2)
    engine.close()
    run_ranks(2, HERE / "rank_checkpoint.py", str(root))
    return root


def checkpoint_of(root: Path, case: str) -> Path:
    return root / case / "checkpoints" / "step-00000002"


def test_two_ranks_go_on_bit_for_bit(saved: Path) -> None:
    for found in json.loads((saved / "found.json").read_text()):
        wrong = [name for name, right in found.items() if right is False]
        assert not wrong


def test_every_stage_loads_every_other(saved: Path) -> None:
    for before in range(4):
        original = whole_state(checkpoint_of(saved, f"fp32-{before}"))
        for after in range(4):
            assert_equal(original, whole_state(checkpoint_of(saved, f"{before}-to-{after}")))
    for found in json.loads((saved / "found.json").read_text()):
        logits = [value for name, value in found.items() if name.endswith("logits")]
        assert max(logits) - min(logits) < 1e-4


def test_number_of_ranks_changes(saved: Path) -> None:
    assert_equal(whole_state(checkpoint_of(saved, "alone")), whole_state(checkpoint_of(saved, "alone-to-2")))
    for stage in range(4):
        engine = new_engine(alone(), stage, seed=9)
        load_checkpoint(checkpoint_of(saved, "fp32-3"), engine, seed=0)
        stored = whole_state(checkpoint_of(saved, "fp32-3"))
        for part in held_fragments(engine):
            expected = stored[part.kind, part.name][part.start : part.start + part.tensor.numel()]
            assert torch.equal(part.tensor, expected)
        engine.close()


def test_load_weights_gives_a_whole_state(saved: Path) -> None:
    for stage in range(4):
        weights = load_weights(checkpoint_of(saved, f"fp32-{stage}"))
        missing, unexpected = TinyModel(seed=5).load_state_dict(weights, strict=True)
        assert not missing
        assert not unexpected
        assert torch.equal(weights["frozen.weight"], TinyModel().frozen.weight)
        assert torch.equal(weights["scale"], TinyModel().scale)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_named(saved: Path, tmp_path: Path, damage: str) -> None:
    for file in sorted(checkpoint_of(saved, "fp32-2").iterdir()):
        run_dir = tmp_path / file.name
        shutil.copytree(saved / "fp32-2", run_dir)
        victim = checkpoint_of(tmp_path, file.name) / file.name
        content = bytearray(victim.read_bytes())
        victim.unlink()
        if damage == "flip":
            content[len(content) // 2] ^= 1
            victim.write_bytes(content)
        elif damage == "truncate":
            victim.write_bytes(content[:-1])
        if damage == "remove" and file.name == "manifest.json":
            assert checkpoint_folder.latest_checkpoint(run_dir) is None
            continue
        with pytest.raises(UserError, match=file.name):
            newest_valid(run_dir, alone())


def test_another_model_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rank_models.WIDTH", 11)
    engine = new_engine(alone(), 0)
    with pytest.raises(UserError, match=r"'head\.weight' is \[3, 10\] there and \[3, 11\]"):
        load_checkpoint(checkpoint_of(saved, "fp32-0"), engine, seed=0)
    engine.close()


def test_newest_and_best_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        staging = checkpoint_folder.open_staging(tmp_path, step)
        (staging / "state.json").write_text("{}")
        entries = {"state.json": checkpoint_folder.file_entry(staging / "state.json")}
        checkpoint_folder.commit(staging, step, entries, best=step == 20)
        checkpoint_folder.prune(tmp_path, keep_last=1)
    assert [path.name for path in checkpoint_folder.checkpoints_of(tmp_path)] == ["step-00000020", "step-00000040"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000040"
    assert checkpoint_folder.best_or_latest(tmp_path).name == "step-00000020"


def test_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    staging = checkpoint_folder.open_staging(tmp_path, 10)
    (staging / "fragments-00000.safetensors").write_bytes(b"half")
    assert checkpoint_folder.latest_checkpoint(tmp_path) is None
    checkpoint_folder.remove_staging(tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def whole_state(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """(kind, name) -> all elements, flat, straight from the files."""
    from safetensors.torch import load_file

    pieces: dict[tuple[str, str], list[tuple[int, torch.Tensor]]] = {}
    for file in checkpoint.glob("fragments-*.safetensors"):
        for key, part in load_file(file).items():
            kind, start, name = key.split(":", 2)
            pieces.setdefault((kind, name), []).append((int(start), part))
    return {
        key: torch.cat([part for _, part in sorted(parts, key=lambda item: item[0])]) for key, parts in pieces.items()
    }


def assert_equal(one: dict[tuple[str, str], torch.Tensor], other: dict[tuple[str, str], torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


def test_pointers_are_mended_after_a_kill_between_the_folder_and_its_name(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        staging = checkpoint_folder.open_staging(tmp_path, step)
        (staging / "state.json").write_text("{}")
        entries = {"state.json": checkpoint_folder.file_entry(staging / "state.json")}
        checkpoint_folder.commit(staging, step, entries, best=step != 30)
    folder = tmp_path / "checkpoints"
    for name in ("latest", "best"):
        (folder / name).write_text("step-00000010")
    checkpoint_folder.point(tmp_path)
    assert [(folder / name).read_text() for name in ("latest", "best")] == ["step-00000030", "step-00000020"]
    # Removing a damaged checkpoint, as its error says, leaves the one before it.
    shutil.rmtree(folder / "step-00000030")
    checkpoint_folder.point(tmp_path)
    assert (folder / "latest").read_text() == "step-00000020"

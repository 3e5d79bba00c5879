"""Damaged checkpoints: always named, kept under another name, and the next whole one is used instead.

DeepSpeed loads one with a flipped byte without a word; of one that is truncated, one rank hears and the others hang.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rank_checkpoint import counts, new_engine, train
from rank_models import alone

from crossguard.configs.errors import UserError
from crossguard.train import checkpoint_folder
from crossguard.train.checkpoint import best_valid, newest_valid
from crossguard.train.checkpoint_folder import checkpoints_of, latest_checkpoint
from crossguard.train.checkpoint_manifest import MANIFEST, entry, read_manifest, verify
from crossguard.train.checkpoint_saving import CheckpointSaver

OLD, NEW = "step-00000001", "step-00000002"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with two checkpoints, the newer one the best."""
    run_dir = tmp_path_factory.mktemp("damage") / "saved"
    engine = new_engine(alone(), 1)
    with CheckpointSaver(run_dir, engine, keep_last=2) as saver:
        for step in (1, 2):
            train(engine, range(step, step + 1))
            saver.save(counts(step), {"refused.npy": b"of some step"}, best=step == 2)
    engine.close()
    return run_dir


FILES = ("fragments-00000.safetensors", "manifest.json", "random-00000.json", "refused.npy", "state.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "empty"])
def test_the_older_one_is_used(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    assert {file.name for file in (saved / "checkpoints" / NEW).iterdir()} == set(FILES)
    run_dir = copy_of(saved, tmp_path)
    hurt(run_dir / "checkpoints" / NEW / name, damage)
    chosen = newest_valid(run_dir, alone())
    assert chosen == run_dir / "checkpoints" / OLD
    warning = capsys.readouterr().err
    assert warning.count(f"{NEW}/{name}: ") == 1
    assert f"{OLD} is used instead" in warning
    folder = run_dir / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {OLD, f"{NEW}.damaged", "latest"}
    assert (folder / "latest").read_text() == OLD
    assert len(list((folder / f"{NEW}.damaged").iterdir())) == len(FILES) - (damage == "remove")
    assert newest_valid(run_dir, alone()) == chosen
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", FILES)
def test_a_file_in_another_s_place_is_refused(saved: Path, tmp_path: Path, name: str) -> None:
    """Of the same checkpoint, the two exchanged, or of another step, whose manifest is whole in itself."""
    run_dir = copy_of(saved, tmp_path)
    old, new = (run_dir / "checkpoints" / step for step in (OLD, NEW))
    for other in FILES:
        exchange(new / name, new / other)
        if other != name:
            with pytest.raises(UserError, match=rf"{NEW}/({name}|{other}|{MANIFEST}): "):
                verify(new)
        exchange(new / name, new / other)
    verify(new)
    same = (old / name).read_bytes() == (new / name).read_bytes()
    assert same == (name in ("random-00000.json", "refused.npy"))
    if not same:
        exchange(new / name, old / name)
        with pytest.raises(UserError, match=NEW):
            verify(new)


def test_any_flipped_bit_of_a_manifest_is_seen(saved: Path, tmp_path: Path) -> None:
    checkpoint = copy_of(saved, tmp_path) / "checkpoints" / NEW
    whole = (checkpoint / MANIFEST).read_bytes()
    for bit in range(len(whole) * 8):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        (checkpoint / MANIFEST).write_bytes(content)
        with pytest.raises(UserError, match=r"manifest\.json: altered"):
            read_manifest(checkpoint)
    (checkpoint / MANIFEST).write_bytes(whole)
    verify(checkpoint)


def test_two_in_a_row_are_left_out_and_none_at_all_is_an_error(saved: Path, tmp_path: Path) -> None:
    run_dir = copy_of(saved, tmp_path)
    shutil.copytree(run_dir / "checkpoints" / NEW, run_dir / "checkpoints" / "step-00000003")
    for step, name in ((2, "state.json"), (3, "fragments-00000.safetensors")):
        hurt(run_dir / "checkpoints" / f"step-{step:08d}" / name, "flip")
    assert newest_valid(run_dir, alone()) == run_dir / "checkpoints" / OLD
    hurt(run_dir / "checkpoints" / OLD / MANIFEST, "remove")
    for ask in (newest_valid, best_valid):
        with pytest.raises(
            UserError, match=rf"every checkpoint is damaged \(.*{OLD}/manifest.json: unreadable"
        ) as found:
            ask(run_dir, alone())
        assert found.value.exit_status == 2
    assert (run_dir / "checkpoints" / OLD).is_dir()  # So that the next start does not begin anew.


@pytest.mark.parametrize("name", ["fragments-00000.safetensors", "manifest.json"])
def test_evaluation_and_export_do_without_a_damaged_best_one(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run_dir = copy_of(saved, tmp_path)
    assert best_valid(run_dir, alone()).name == NEW
    hurt(run_dir / "checkpoints" / NEW / name, "flip")
    assert best_valid(run_dir, alone()).name == OLD
    assert f"{NEW}/{name}" in capsys.readouterr().err
    assert checkpoint_folder.best_or_latest(run_dir).name == OLD


def test_what_shows_at_once_is_left_out_by_every_reader(saved: Path, tmp_path: Path) -> None:
    run_dir = copy_of(saved, tmp_path)
    hurt(run_dir / "checkpoints" / NEW / "state.json", "flip")
    assert latest_checkpoint(run_dir) == run_dir / "checkpoints" / OLD
    assert checkpoint_folder.best_or_latest(run_dir).name == OLD
    # Retention counts the whole ones.
    commit(run_dir, 3)
    checkpoint_folder.prune(run_dir, keep_last=2)
    assert [path.name for path in checkpoints_of(run_dir)] == [OLD, "step-00000003"]
    assert (run_dir / "checkpoints" / NEW).is_dir()


def test_another_version_is_neither_damaged_nor_a_fresh_start(saved: Path, tmp_path: Path) -> None:
    run_dir = copy_of(saved, tmp_path)
    (run_dir / "checkpoints" / NEW / MANIFEST).write_text(json.dumps({"format": 2, "best": False, "files": {}}))
    for ask in (newest_valid, best_valid):
        with pytest.raises(UserError, match="format 2, this version of crossguard reads 3"):
            ask(run_dir, alone())
    assert latest_checkpoint(run_dir) == run_dir / "checkpoints" / NEW


def test_a_fresh_run_directory_has_none(tmp_path: Path) -> None:
    assert newest_valid(tmp_path, alone()) is None
    with pytest.raises(UserError, match="no checkpoint; train first"):
        best_valid(tmp_path, alone())


def test_newest_and_best_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        commit(tmp_path, step, best=step == 20)
        checkpoint_folder.prune(tmp_path, keep_last=1)
    assert [path.name for path in checkpoints_of(tmp_path)] == ["step-00000020", "step-00000040"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000040"
    assert checkpoint_folder.best_or_latest(tmp_path).name == "step-00000020"


def test_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    staging = checkpoint_folder.open_staging(tmp_path, 10)
    (staging / "fragments-00000.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) is None
    checkpoint_folder.remove_staging(tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_pointers_are_mended_after_a_kill_between_the_folder_and_its_name(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        commit(tmp_path, step, best=step != 30)
    folder = tmp_path / "checkpoints"
    for name in ("latest", "best"):
        (folder / name).write_text("step-00000010")
    checkpoint_folder.point(tmp_path)
    assert [(folder / name).read_text() for name in ("latest", "best")] == ["step-00000030", "step-00000020"]


def commit(run_dir: Path, step: int, *, best: bool = False) -> None:
    """A checkpoint with a state alone."""
    staging = checkpoint_folder.open_staging(run_dir, step)
    (staging / "state.json").write_text("{}")
    checkpoint_folder.commit(staging, step, {"state.json": entry((staging / "state.json").read_bytes())}, best=best)


def copy_of(saved: Path, folder: Path) -> Path:
    return shutil.copytree(saved, folder / "run")


def exchange(one: Path, other: Path) -> None:
    """The contents of two files."""
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def hurt(file: Path, damage: str) -> None:
    """One bit in the middle, the last byte, all bytes, or the whole file."""
    content = bytearray(file.read_bytes())
    file.unlink()
    if damage == "flip":
        content[len(content) // 2] ^= 1
    if damage != "remove":
        file.write_bytes(b"" if damage == "empty" else content[:-1] if damage == "truncate" else content)

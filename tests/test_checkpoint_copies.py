"""Copies of checkpoints behind a URL: complete or absent, taken by another machine, never at the cost of an older one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from rank_checkpoint import counts, new_engine, train
from rank_models import alone
from rank_training import arguments, write_shards
from s3_server import Server

from crossguard.configs.compose import compose
from crossguard.configs.errors import JobError, UserError
from crossguard.data.shards import remote, storage
from crossguard.train.checkpoint_copies import CheckpointCopies
from crossguard.train.checkpoint_folder import checkpoint_folders, checkpoints_of
from crossguard.train.checkpoint_manifest import verify
from crossguard.train.checkpoint_saving import CheckpointSaver
from crossguard.train.engine import Engine
from crossguard.train.stored_weights import load_weights
from crossguard.train.training import run_training

URL = "s3://shards/run-1"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = new_engine(alone(), 1)
    train(engine, range(1, 2))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_shards(folder)
    return folder


def save(run_dir: Path, engine: Engine, *steps: int, url: str = URL, in_background: bool = False) -> None:
    copies = CheckpointCopies(url)
    with CheckpointSaver(run_dir, engine, keep_last=2, in_background=in_background, copies=copies) as saver:
        for step in steps:
            saver.save(counts(step), {}, best=step == 1)


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def stored() -> list[str]:
    """The folders behind the URL."""
    store = fsspec.filesystem("s3")
    store.invalidate_cache()
    return sorted(name.rpartition("/")[2] for name in store.ls(URL)) if store.exists(URL) else []


@pytest.mark.parametrize("in_background", [False, True], ids=["in front", "in the background"])
def test_what_the_run_directory_keeps_is_kept_behind_the_url(
    server: Server, tmp_path: Path, engine: Engine, in_background: bool
) -> None:
    save(tmp_path / "here", engine, 1, 2, 3, 4, in_background=in_background)
    kept = ["step-00000001", "step-00000003", "step-00000004"]  # the best one and the last two
    assert stored() == kept
    taken = CheckpointCopies(f"{URL}/").take(tmp_path / "there")
    assert names(taken) == kept
    for path in taken:
        verify(path)
        assert {file.name: file.read_bytes() for file in path.iterdir()} == {
            file.name: file.read_bytes() for file in (tmp_path / "here/checkpoints" / path.name).iterdir()
        }
    assert (tmp_path / "there/checkpoints/latest").read_text() == kept[-1]
    assert (tmp_path / "there/checkpoints/best").read_text() == kept[0]
    server.requests.clear()
    assert CheckpointCopies(URL).take(tmp_path / "there") == []
    assert set(server.count("GET")) <= {"/shards", *(f"/shards/run-1/{name}/manifest.json" for name in kept)}


def test_another_machine_goes_on_as_if_nothing_had_happened(server: Server, folder: Path) -> None:
    run(folder, "whole", "train.max_steps=8")
    run(folder, "first", "train.max_steps=4", f"checkpoint.copy_to={URL}")
    shutil.rmtree(folder / "first")
    run(folder, "second", "train.max_steps=8", f"checkpoint.copy_to={URL}")
    assert losses(folder / "second") == losses(folder / "whole")[4:]
    weights = [load_weights(checkpoints_of(folder / run_dir)[-1]) for run_dir in ("second", "whole")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[1])
    with pytest.raises(UserError, match=rf"{URL}: has checkpoints of another configuration: train\.lr"):
        run(folder, "third", "train.max_steps=8", "train.lr=3", f"checkpoint.copy_to={URL}")
    assert not checkpoint_folders(folder / "third")
    with pytest.raises(UserError, match=rf"copy_to={URL} holds checkpoints of the run that is to begin anew"):
        run(folder, "second", "train.max_steps=8", f"checkpoint.copy_to={URL}", "train.restart=true")
    assert stored() == names(checkpoint_folders(folder / "second")) == ["step-00000004", "step-00000008"]


def run(folder: Path, run_dir: str, *overrides: str) -> None:
    run_training(compose(arguments(folder, run_dir, "train.schedule_steps=8", *overrides)), alone())


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_what_is_incomplete_or_damaged_is_not_taken(
    server: Server, tmp_path: Path, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "here", engine, 1, 2, 3)
    store = fsspec.filesystem("s3")
    store.rm_file(f"{URL}/step-00000003/manifest.json")  # the upload was killed before its end
    name = f"{URL}/step-00000002/fragments-00000.safetensors"
    content = bytearray(store.cat_file(name))
    content[-1] ^= 1
    store.pipe_file(name, bytes(content))
    assert names(CheckpointCopies(URL).take(tmp_path / "there")) == ["step-00000001"]
    assert names(checkpoint_folders(tmp_path / "there")) == ["step-00000001"]
    assert f"{URL}/step-00000002 is damaged and not used" in caplog.text
    # The next save removes what is behind the URL alone.
    save(tmp_path / "there", engine, 4)
    assert stored() == ["step-00000001", "step-00000004"]


class Refusing:
    """A store that takes no file any more."""

    def __init__(self, store: Any, error: Exception):
        self._store, self._error = store, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put_file(self, *_: Any) -> None:
        raise self._error


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (PermissionError("Access Denied"), UserError, "Access Denied; give this user access to it"),
        (OSError("SlowDown"), JobError, "SlowDown, 8 tries; check the storage, then start again"),
    ],
)
@pytest.mark.parametrize("in_background", [False, True], ids=["in front", "in the background"])
def test_a_store_that_refuses_costs_no_older_checkpoint(
    server: Server,
    tmp_path: Path,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[Exception],
    message: str,
    in_background: bool,
) -> None:
    save(tmp_path, engine, 1, 2)
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(storage, "LONGEST_WAIT", 0.0)
    opener = remote._open
    with monkeypatch.context() as patch:
        patch.setattr(remote, "_open", lambda url: (Refusing((opened := opener(url))[0], error), opened[1]))
        with pytest.raises(kind, match=rf"{URL}/step-00000003/\S+: {message}"):
            save(tmp_path, engine, 3, in_background=in_background)
    assert names(checkpoint_folders(tmp_path))[-2:] == ["step-00000002", "step-00000003"]
    assert names(CheckpointCopies(URL).take(tmp_path / "there")) == ["step-00000001", "step-00000002"]
    save(tmp_path, engine, 4)
    assert stored() == ["step-00000001", "step-00000004"]


def test_a_plain_folder_serves_as_well(tmp_path: Path, engine: Engine) -> None:
    save(tmp_path / "here", engine, 1, 2, 3, 4, url=str(tmp_path / "share/run"))
    assert names(sorted((tmp_path / "share/run").iterdir())) == ["step-00000001", "step-00000003", "step-00000004"]
    assert len(CheckpointCopies(str(tmp_path / "share/run")).take(tmp_path / "there")) == 3

"""Saving: beside training, on a full disk, in a folder that refuses to be written, and when the process is killed."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rank_checkpoint import counts, new_engine, train
from rank_jobs import RankJob, wait_until
from rank_models import alone, run_ranks
from safetensors import safe_open

from crossguard.configs.errors import JobError
from crossguard.train import checkpoint_saving
from crossguard.train.checkpoint import newest_valid
from crossguard.train.checkpoint_folder import checkpoint_folders, latest_checkpoint, remove_staging
from crossguard.train.checkpoint_manifest import entry, verify
from crossguard.train.checkpoint_saving import CheckpointSaver
from crossguard.train.engine import Engine
from crossguard.train.fragment_file import write_tensors
from crossguard.train.host_copy import HostCopy
from crossguard.train.metrics_log import LineLog, cut_after

HERE = Path(__file__).parent
BOTH_WAYS = pytest.mark.parametrize("in_background", [False, True], ids=["in front", "in the background"])


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = new_engine(alone(), 1)
    train(engine, range(1, 2))
    yield engine
    engine.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 256 KiB, where we may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Writing fails past `size` bytes of a file, as on a full disk; Python ignores the signal that comes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@BOTH_WAYS
def test_a_full_disk_leaves_the_last_checkpoint(small_disk: Path, engine: Engine, in_background: bool) -> None:
    with CheckpointSaver(small_disk, engine, keep_last=3) as saver:
        saver.save(counts(1), {})
    other = small_disk / "other"
    with other.open("wb") as opened:
        os.posix_fallocate(opened.fileno(), 0, shutil.disk_usage(small_disk).free)
    expect_refusal(small_disk, engine, in_background, "No space left on device")
    # With space again, the same run goes on.
    other.unlink()
    with CheckpointSaver(small_disk, engine, keep_last=3, in_background=in_background) as saver:
        saver.save(counts(2), {})
    assert names(small_disk) == ["latest", "step-00000001", "step-00000002"]


def test_a_full_disk_is_named_by_the_line_that_it_refuses(small_disk: Path) -> None:
    (small_disk / "other").write_bytes(b"x" * (100 << 10))
    log = LineLog(small_disk / "metrics.jsonl")
    with pytest.raises(
        JobError, match=rf"^{small_disk}/metrics\.jsonl: cannot write \(No space left on device\); free"
    ):
        write_lines(log)
    log.close()
    (small_disk / "other").unlink()
    cut_after(small_disk, 10)
    lines = [json.loads(line) for line in (small_disk / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))


def write_lines(log: LineLog) -> None:
    """Far more than the disk takes."""
    for step in range(1, 100):
        log.write({"step": step, "ids": ["x" * 5000]})


@BOTH_WAYS
def test_a_file_that_may_not_grow(tmp_path: Path, engine: Engine, in_background: bool) -> None:
    with CheckpointSaver(tmp_path, engine, keep_last=3) as saver:
        saver.save(counts(1), {})
    with no_file_above(1024):
        expect_refusal(tmp_path, engine, in_background, "File too large")


@BOTH_WAYS
def test_a_folder_that_cannot_be_written(tmp_path: Path, engine: Engine, in_background: bool) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(JobError, match=rf"^{tmp_path}/checkpoints: rank 0 cannot save .*there is none yet"):
        save_once(tmp_path, engine, in_background)


def save_once(run_dir: Path, engine: Engine, in_background: bool, error: Exception | None = None) -> None:
    """Save step 2, and fail with `error` after that."""
    with CheckpointSaver(run_dir, engine, keep_last=3, in_background=in_background) as saver:
        saver.save(counts(2), {})
        if error is not None:
            raise error


def expect_refusal(run_dir: Path, engine: Engine, in_background: bool, reason: str) -> None:
    """One error with folder, reason and remedy; nothing is left of the attempt, and step 1 is whole."""
    with pytest.raises(JobError) as refused:
        save_once(run_dir, engine, in_background)
    assert str(refused.value) == (
        f"{run_dir}/checkpoints: rank 0 cannot save a checkpoint ({reason}); step-00000001 is untouched;"
        " free space there, or allow writing, then start again to resume"
    )
    assert names(run_dir) == ["latest", "step-00000001"]
    verify(run_dir / "checkpoints" / "step-00000001")


def test_a_failed_save_is_told_by_the_next(tmp_path: Path, engine: Engine) -> None:
    with CheckpointSaver(tmp_path, engine, keep_last=3, in_background=True) as saver:
        with no_file_above(1024):
            saver.save(counts(1), {})
            with pytest.raises(JobError, match="File too large"):
                saver.save(counts(2), {})
        saver.save(counts(3), {})
    assert names(tmp_path) == ["latest", "step-00000003"]


def test_an_error_of_training_still_completes_the_save(tmp_path: Path, engine: Engine) -> None:
    with pytest.raises(KeyError, match="of training"):
        save_once(tmp_path, engine, True, KeyError("of training"))
    assert newest_valid(tmp_path, alone()) == tmp_path / "checkpoints" / "step-00000002"


def test_an_error_of_training_is_not_hidden_by_that_of_the_save(
    tmp_path: Path, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    with no_file_above(1024), pytest.raises(KeyError, match="of training"):
        save_once(tmp_path, engine, True, KeyError("of training"))
    assert "cannot save a checkpoint (File too large)" in capsys.readouterr().err


def test_training_goes_on_beside_a_slow_disk(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk waits until two further steps are done; what is written is the state before them."""
    may_write = threading.Event()

    def slow(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, object]:
        assert may_write.wait(60)
        return write_tensors(path, tensors)

    with CheckpointSaver(tmp_path / "in-front", engine, keep_last=1) as saver:
        saver.save(counts(1), {})
    monkeypatch.setattr(checkpoint_saving, "write_tensors", slow)
    with CheckpointSaver(tmp_path / "beside", engine, keep_last=1, in_background=True) as saver:
        saver.save(counts(1), {})
        train(engine, range(2, 4))
        assert latest_checkpoint(tmp_path / "beside") is None
        may_write.set()
    one, other = (
        (tmp_path / way / "checkpoints" / "step-00000001" / "fragments-00000.safetensors").read_bytes()
        for way in ("in-front", "beside")
    )
    assert one == other


def test_memory_is_used_again() -> None:
    copy = HostCopy()
    first = copy.take({"a": torch.arange(5), "b": torch.ones(3, dtype=torch.bfloat16)})
    assert torch.equal(first["a"], torch.arange(5))
    address = first["a"].data_ptr()
    second = copy.take({"b": torch.zeros(2, dtype=torch.bool), "c": torch.rand(3)})
    assert second["b"].data_ptr() == address
    assert all(tensor.data_ptr() % 64 == address % 64 for tensor in second.values())


def test_a_file_of_tensors_is_read_by_safetensors(tmp_path: Path) -> None:
    types = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
    types += (torch.int8, torch.uint8, torch.bool)
    tensors = {f"ü{kind}": torch.arange(7).to(kind) for kind in types} | {"none": torch.zeros(0)}
    tensors["large"] = torch.rand(700_001)
    stated = write_tensors(tmp_path / "file", tensors)
    assert stated == entry((tmp_path / "file").read_bytes())
    with safe_open(tmp_path / "file", framework="pt") as opened:
        assert set(opened.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(opened.get_tensor(name), tensor)
            assert opened.get_tensor(name).dtype == tensor.dtype


def test_two_ranks(tmp_path: Path) -> None:
    """A rank whose disk is full, and a file of one rank that is altered; both ranks, and the start after, agree."""
    run_ranks(2, HERE / "rank_saving.py", str(tmp_path))
    found = json.loads((tmp_path / "found.json").read_text())
    for way in ("front", "background"):
        assert found[0][way] == found[1][way]
        assert "rank 1 cannot save a checkpoint (File too large); step-00000001 is untouched" in found[0][way]
        assert names(tmp_path / way) == ["latest", "step-00000001"]
    assert found[0]["shared"] == found[1]["shared"] == "step-00000001"
    assert names(tmp_path / "shared") == ["latest", "step-00000001", "step-00000002.damaged"]


def test_what_a_kill_leaves_at_any_moment_is_whole(tmp_path: Path) -> None:
    """A process saves in the background without pause; whenever it is stopped, its folder is what a kill would leave.

    DeepSpeed writes into the final folder: what a kill leaves there is half of a checkpoint, under its name.
    """
    draw, stagings = random.Random(0), 0
    with RankJob([str(HERE / "rank_saving.py"), str(tmp_path), "endless"], 1) as job:
        (pid,) = job.pids
        wait_until(lambda: latest_checkpoint(tmp_path) is not None or job.over())
        for _ in range(60):
            assert not job.over(), job.said()
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda: stopped(pid), between=0.001)
            complete = checkpoint_folders(tmp_path)
            assert complete
            for checkpoint in complete:
                verify(checkpoint)
            stagings += any((tmp_path / "checkpoints").glob(".staging-*"))
            os.kill(pid, signal.SIGCONT)
            time.sleep(draw.uniform(0, 0.03))
    assert stagings, "no moment was in the middle of a save"
    newest = newest_valid(tmp_path, alone())
    assert newest == latest_checkpoint(tmp_path)


def stopped(pid: int) -> bool:
    """All threads of a process."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    try:
        return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks)
    except (FileNotFoundError, ProcessLookupError):  # a thread ended just now
        return False


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("moved_in", [False, True])
def test_a_kill_while_a_step_is_saved_once_more_loses_nothing(tmp_path: Path, moved_in: bool) -> None:
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / ".staging-replaced-step-00000003").mkdir(parents=True)
    (checkpoints / ".staging-replaced-step-00000003" / "old").touch()
    if moved_in:
        (checkpoints / "step-00000003").mkdir()
    remove_staging(tmp_path)
    (left,) = checkpoints.iterdir()
    assert left.name == "step-00000003"
    assert (left / "old").exists() != moved_in

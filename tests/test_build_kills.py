"""A build that is killed at any moment, with all its processes, goes on to the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from build_job import build, build_line, files_of, make_config, make_posts, write_lines
from rank_jobs import alive

from crossguard.configs.errors import JobError, UserError
from crossguard.data.shards.manifest import Manifest
from crossguard.data.shards.workspace import Workspace

KILLS = 25
# A kill leaves the kernel with what was written: waiting for a disk, which is most of a small build, would show nothing.
MEMORY = Path("/dev/shm")


@pytest.mark.parametrize("kind", ["new", "append"])
def test_random_kills_of_a_build_on_two_processes(kind: str) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        line = [sys.executable, str(Path(__file__).with_name("kill_job.py")), folder, str(KILLS), kind]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def wait_until(done: Any, process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait for `done()`; a process that ends before that is a failure of the test."""
    while not done():
        assert process is None or process.poll() is None, "the build ended before it could be killed"
        time.sleep(0.002)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_build_goes_on_wherever_it_was_killed(tmp_path: Path) -> None:
    posts = write_lines(tmp_path / "p.jsonl", make_posts(30))
    whole = build(make_config(posts, samples_per_shard=2), tmp_path / "whole")
    shards = tmp_path / "run/shards"
    kept: dict[Path, int] = {}
    for function, call in (
        ("spool.canonical_json", 7),  # in the middle of the scan
        ("plan.atomic_file", 1),  # all posts are spooled
        ("plan.write_atomic", 1),  # the rows are written, the plan is not
        ("writer.hex_keys", 3),  # a tar is begun
        ("writer.encode_index", 2),  # a tar is written, its index is not
        ("writer.asdict", 3),  # an index is written, its done-record is not
        ("files.sync", 2),  # a tar has just been renamed
        ("manifest.write_atomic", 1),  # every shard is done
    ):
        line = build_line(posts, tmp_path / "run", 1, f"crossguard.data.shards.{function}", str(call))
        ended = subprocess.run(line, stderr=subprocess.DEVNULL, check=False)
        assert ended.returncode == -signal.SIGKILL, function
        assert not (shards / "manifest.json").exists()
        assert all(path.stat().st_mtime_ns == written for path, written in kept.items()), function
        records = (json.loads(path.read_bytes()) for path in (shards / ".build/done").glob("[!.]*.json"))
        done = [shards / record["info"]["path"] for record in records]
        assert len(done) >= len(kept)
        kept = {path: path.stat().st_mtime_ns for path in done}
    assert len(kept) == len(whole.shards)
    assert build(make_config(posts, samples_per_shard=2), tmp_path / "run") == whole
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert files_of(shards) == files_of(tmp_path / "whole/shards")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_processes_of_a_killed_build_die_with_it(tmp_path: Path) -> None:
    posts = write_lines(tmp_path / "p.jsonl", make_posts(600))
    done = tmp_path / "run/shards/.build/done"
    process = subprocess.Popen(build_line(posts, tmp_path / "run", 2), stderr=subprocess.DEVNULL)
    wait_until(lambda: len(list(done.glob("*.json"))) >= 5, process)
    children = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(children) >= 2
    wait_until(lambda: not any(map(alive, children)))
    assert build(make_config(posts, samples_per_shard=2, num_workers=2), tmp_path / "run").splits
    assert not (tmp_path / "run/shards/.build").exists()


def test_what_a_killed_build_of_other_posts_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crossguard.data.shards import build as module

    write = module.write_shard
    written: list[str] = []

    def interrupted(task: Any) -> Any:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(task.shard.path)
        return write(task)

    posts = write_lines(tmp_path / "p.jsonl", make_posts(60))
    monkeypatch.setattr(module, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(make_config(posts), tmp_path / "run")
    assert all((tmp_path / "run/shards" / path).exists() for path in written)
    monkeypatch.undo()
    others = [{**post, "split": "other"} for post in make_posts(9)]
    manifest = build(make_config(write_lines(posts, others)), tmp_path / "run")
    assert set(files_of(tmp_path / "run/shards")) == {
        "manifest.json",
        *(path for shard in manifest.shards for path in (shard.path, shard.index_path)),
    }


def test_a_wrong_post_after_a_kill_leaves_nothing(tmp_path: Path) -> None:
    shards = tmp_path / "failed/shards"
    (shards / ".build").mkdir(parents=True)
    (shards / ".build/spool.bin").write_bytes(b"of a build that was killed")
    with pytest.raises(UserError):
        build(make_config(write_lines(tmp_path / "p.jsonl", [{"id": "1"}])), tmp_path / "failed")
    assert not shards.exists()


def test_a_kill_between_manifest_and_clean_up(tmp_path: Path) -> None:
    posts = write_lines(tmp_path / "p.jsonl", make_posts(9))
    manifest = build(make_config(posts), tmp_path / "run")
    (tmp_path / "run/shards/.build/done").mkdir(parents=True)
    assert build(make_config(posts), tmp_path / "run") == manifest
    assert not (tmp_path / "run/shards/.build").exists()


def test_two_builds_do_not_mix(tmp_path: Path) -> None:
    posts = write_lines(tmp_path / "p.jsonl", make_posts(9))
    shards = tmp_path / "run/shards"
    with Workspace(shards), pytest.raises(JobError, match=f"process {os.getpid()} is building here"):
        build(make_config(posts), tmp_path / "run")
    assert build(make_config(posts), tmp_path / "run") == Manifest.load(shards)

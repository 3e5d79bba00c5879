"""Builds on two processes that are killed at random moments, all processes at once, until enough kills were survived.

A program of its own: it forks each build, since starting an interpreter would take longer than what is to be killed,
and a process that forks should have no threads.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from build_job import build, files_of, make_config, make_posts, write_lines

from crossguard.configs.schema import Config
from crossguard.data.shards.manifest import FILE_NAME

FOREVER = 1e9


def build_and_kill(config: Config, run_dir: Path, seconds: float = FOREVER) -> bool:
    """Whether a build was done before SIGKILL reached it and its writing processes."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            build(config, run_dir)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
    os.setpgid(pid, pid)  # both sides say so, for neither knows which is first
    deadline = time.monotonic() + seconds
    while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.001)
    if not ended[0]:
        os.killpg(pid, signal.SIGKILL)
        ended = os.waitpid(pid, 0)
    assert ended[1] in (0, signal.SIGKILL), "the build failed"
    return ended[1] == 0


def done_shards(shards: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each shard and index that has its done-record."""
    names = {path.stem for path in (shards / ".build/done").glob("[!.]*.json")}
    files = (path for path in shards.glob("[!.]*/*") if path.stem in names)
    return {str(path.relative_to(shards)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def survive(folder: Path, kills: int, appending: bool) -> None:
    """Kill builds so often; each is started again until it is done, and then has the bytes of one never killed."""
    posts = folder / "posts.jsonl"
    config = make_config(posts, samples_per_shard=2, num_workers=2, append=True)

    def begin(run_dir: Path) -> bytes | None:
        if not appending:
            return None
        write_lines(posts, make_posts(6))
        build_and_kill(config, run_dir)
        write_lines(posts, make_posts(46))
        return (run_dir / "shards" / FILE_NAME).read_bytes()

    write_lines(posts, make_posts(46))
    begin(folder / "whole")
    started = time.monotonic()
    build_and_kill(config, folder / "whole")
    seconds = time.monotonic() - started
    whole = files_of(folder / "whole/shards")
    draw, builds = random.Random(0), 0
    while kills > 0:
        run_dir, builds = folder / f"run-{builds}", builds + 1
        shards, old = run_dir / "shards", begin(run_dir)
        kept: dict[str, tuple[int, int]] = {}
        while not build_and_kill(config, run_dir, draw.uniform(0, seconds) if kills > 0 else FOREVER):
            kills -= 1
            found = files_of(shards) if shards.exists() else {}
            final = {path for path in found if not path.startswith(".build/")}
            assert all(found[path] == whole[path] for path in final - {FILE_NAME}), "a file is there in part"
            assert found.get(FILE_NAME) in (old, whole[FILE_NAME])
            if found.get(FILE_NAME) == old:  # else all is done but the clean-up, which begins with the records
                done = done_shards(shards)
                assert kept.items() <= done.items(), "a shard that was done was written again"
                kept = done
        assert files_of(shards) == whole, "other bytes than those of a build that was never killed"


if __name__ == "__main__":
    survive(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "append")

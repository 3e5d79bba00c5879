"""The pool that forks ranks: they are what ranks of torchrun would be, and nothing of them outlives what started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from rank_jobs import LONGEST, RankJob, alive, wait_until
from rank_models import run_ranks

HERE = Path(__file__).parent
RANK = """
import json, os, random, sys, threading
import numpy, torch, torch.distributed as dist
from crossguard.train.ranks import end_process, init_ranks

sockets = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]
about = {
    "name": __name__, "file": __file__, "arguments": sys.argv[1:], "path": sys.path[0], "cwd": os.getcwd(),
    "rank": os.environ["RANK"], "local": os.environ["LOCAL_RANK"], "of": os.environ["LOCAL_WORLD_SIZE"],
    "own": os.environ.get("OWN"), "threads": len(os.listdir("/proc/self/task")), "torch_threads": torch.get_num_threads(),
    "drawn": [random.random(), numpy.random.rand(), torch.rand(()).item()], "sockets": [name for name in sockets if name.startswith("socket:")],
}
ranks = init_ranks()
about["sum"] = int(ranks.sum(torch.tensor(ranks.rank + 1)))
sys.stdout.write(json.dumps(about) + "\\n")
if sys.argv[1:] == ["fail"]:
    sys.exit(7 if ranks.rank else 0)
if sys.argv[1:] == ["wait"]:
    threading.Event().wait()
end_process(0)
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    file = tmp_path / "a_rank.py"
    file.write_text(RANK)
    return file


def test_a_rank_is_what_torchrun_would_start(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN", "of this test")
    monkeypatch.chdir(module.parent)
    found = sorted(map(json.loads, run_ranks(2, module, "a b", "c").splitlines()), key=lambda about: about["rank"])
    for rank, about in enumerate(found):
        assert about == {
            "name": "__main__",
            "file": str(module),
            "arguments": ["a b", "c"],
            "path": str(module.parent),
            "cwd": str(module.parent),
            "rank": str(rank),
            "local": str(rank),
            "of": "2",
            "own": "of this test",
            "threads": 1,
            "torch_threads": 1,
            "drawn": about["drawn"],
            "sockets": [],
            "sum": 3,
        }
    assert not set(found[0]["drawn"]) & set(found[1]["drawn"])


def test_a_failure_is_told(module: Path) -> None:
    with pytest.raises(AssertionError, match='"rank": "1"'):
        run_ranks(2, module, "fail")
    with RankJob([str(module), "fail"], 2) as job:
        assert job.wait(60) == [0, 7]
    with RankJob([str(module), "wait"], 2) as job:
        wait_until(lambda: job.printed.count("sum") == 2)
        job.signal(1, signal.SIGKILL)
        assert job.wait(60)[1] == -signal.SIGKILL
        assert job.statuses[0] != 0  # It lives on by itself, and is killed after a while.


def test_nothing_outlives_what_started_it(module: Path) -> None:
    with RankJob([str(module), "wait"], 2) as job:
        wait_until(lambda: job.printed.count("sum") == 2)
        os.kill(job.job, signal.SIGKILL)
        wait_until(lambda: not any(map(alive, job.pids)))
    with RankJob([str(module), "wait"], 2) as job:
        pids = job.pids
    assert not any(map(alive, pids))


def test_the_pool_ends_with_its_client(module: Path) -> None:
    code = f"""
        import os, signal, sys
        sys.path.insert(0, {str(HERE)!r})
        from rank_jobs import RankJob
        job = RankJob([{str(module)!r}, "wait"], 2)
        while job.printed.count("sum") < 2:
            pass
        print(job.job, *job.pids, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, timeout=LONGEST, check=False
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 3
    wait_until(lambda: not any(map(alive, pids)))


def test_watching_a_process_that_has_ended_ends_at_once() -> None:
    code = """
        import subprocess
        from crossguard.configs.parent_death import _die_with
        ended = subprocess.Popen(["true"])
        ended.wait()
        _die_with(ended.pid)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -signal.SIGKILL

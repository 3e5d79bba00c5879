"""One tiny job for every launcher, and what became of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from rank_jobs import run_crossguard
from rank_training import arguments, write_shards

HERE = Path(__file__).parent
STEPS = 6
SETTINGS = [
    *("train.loss.name=waiting_loss:loss", f"train.max_steps={STEPS}", "checkpoint.every_steps=100"),
    # Sums over threads end in other digits; by default a host's cores are shared out among its ranks.
    "launcher.threads_per_proc=1",
]


def job(folder: Path, run_dir: str, *settings: str) -> list[str]:
    """The arguments of the job, to be started in the tests' folder, where its loss lies."""
    return arguments(folder, run_dir, *SETTINGS, *settings)


def losses(folder: Path, run_dir: str) -> list[float]:
    """Of each step, whole numbers from 1, each once."""
    lines = [json.loads(line) for line in (folder / run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    return [line["loss"] for line in steps]


def wait_for(condition: Callable[[], object], what: Callable[[], str], seconds: float = 120) -> None:
    """Wait until something is so; where it takes too long, fail and say what there is instead."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


class Launched:
    """A folder with recipe, posts and shards of the job."""

    def __init__(self, folder: Path):
        write_shards(folder)
        self.folder = folder

    @cached_property
    def expected(self) -> list[float]:
        """The losses of two local ranks."""
        run_crossguard(["train", *job(self.folder, "local", "launcher.num_procs=2")], HERE)
        return losses(self.folder, "local")

"""Training whose ranks are killed at random moments, saves included, until it was survived often enough.

`changing`: the number of ranks (2, 1, 2, …) and the ZeRO stage change with every start. At the end the ids of every
step are those of `preview`, and the loss of every step is that of a run that was never killed, within TOLERANCE.
`same`: nothing changes; metrics, samples and weights are equal bit for bit.

Ranks are forked from this process, which has imported everything: a start then takes a second instead of ten.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import transformers.models.bert.modeling_bert  # noqa: F401 - the same
from rank_training import arguments, write_shards

from crossguard.configs.compose import compose
from crossguard.data.loading import queries
from crossguard.recipes.sample_queries import open_run
from crossguard.train import __main__ as entry
from crossguard.train import training  # noqa: F401 - what forked ranks would otherwise import one by one
from crossguard.train.checkpoint_folder import latest_checkpoint, step_of
from crossguard.train.ranks import end_process

TOLERANCE = 0.02
# How long the others may live on when one rank was killed.
SECONDS_TO_END = 30.0
SETTINGS = ["train.num_workers=0", "checkpoint.every_steps=5", "checkpoint.keep_last=2", "train.schedule_steps=100000"]
# Random numbers of dropout belong to a rank: with other ranks the loss would be another one.
NO_DROPOUT = [
    *("model.text.config.hidden_dropout_prob=0", "+model.text.config.attention_probs_dropout_prob=0"),
    *("model.fusion.dropout=0", "train.lr=1e-3"),
]


class Start:
    """Ranks that train together."""

    def __init__(self, argv: list[str], world_size: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pids = {rank: _fork(argv, rank, world_size, port) for rank in range(world_size)}
        self.statuses: dict[int, int] = {}

    def over(self) -> bool:
        """Whether all have ended."""
        for rank, pid in self.pids.items():
            if rank not in self.statuses and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                self.statuses[rank] = os.waitstatus_to_exitcode(ended[1])
        return len(self.statuses) == len(self.pids)

    def wait(self, seconds: float) -> bool:
        """Whether all have ended within a time."""
        deadline = time.monotonic() + seconds
        while not self.over():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def kill(self, rank: int) -> None:
        """SIGKILL."""
        if rank not in self.statuses:
            os.kill(self.pids[rank], signal.SIGKILL)


def _fork(argv: list[str], rank: int, world_size: int, port: int) -> int:
    pid = os.fork()
    if pid == 0:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        end_process(entry.main(argv))
    return pid


def survive(folder: Path, run_dir: str, kills: int, changing: bool, draw: random.Random) -> int:
    """Kill so often, then go on to the end; returns the last step."""
    saving, slowest, started = 0, 0.0, 0
    settings = [*SETTINGS, *(NO_DROPOUT if changing else ())]
    while kills:
        world_size, stage = (1 + started % 2, draw.randrange(4)) if changing else (2, 1)
        started += 1
        job = Start([*arguments(folder, run_dir, *settings), "train.max_steps=100000", f"zero={stage}"], world_size)
        before = _step(folder / run_dir)
        starting = draw.random() < 0.2
        if not _at_work(job, folder / run_dir, None if starting else before, draw):
            raise SystemExit(f"a start ended by itself: {job.statuses}; see {folder / run_dir}/logs")
        saving += any((folder / run_dir / "checkpoints").glob(".staging-*"))
        killed, since = draw.randrange(world_size), time.monotonic()
        job.kill(killed)
        if starting:  # Where ranks wait for others to come, it is the launcher that ends them.
            for rank in range(world_size):
                job.kill(rank)
        if not job.wait(SECONDS_TO_END):
            raise SystemExit(f"rank {killed} was killed {SECONDS_TO_END} s ago, others live on")
        slowest = max(slowest, time.monotonic() - since)
        kills -= 1
        print(
            f"{run_dir}: killed rank {killed} of {world_size}, stage {stage}, after step {_step(folder / run_dir)}",
            flush=True,
        )
    last = _step(folder / run_dir) + 10
    run(folder, run_dir, last, settings)
    print(
        f"{run_dir}: {started} kills, {saving} of them in a save; the others ended within {slowest:.2f} s", flush=True
    )
    return last


def _at_work(job: Start, run_dir: Path, before: int | None, draw: random.Random) -> bool:
    """Wait for a random moment after a step later than `before` was saved, or of the start; False when it has ended."""
    if before is None:
        return not job.wait(draw.uniform(0, 2))
    while _step(run_dir) == before:
        if job.wait(0.005):
            return False
    return not job.wait(draw.uniform(0, 1))


def run(folder: Path, run_dir: str, last: int, settings: Sequence[str]) -> None:
    """Train to the end on 2 ranks."""
    job = Start([*arguments(folder, run_dir, *settings), f"train.max_steps={last}", "zero=1"], 2)
    if not job.wait(3600) or any(job.statuses.values()):
        raise SystemExit(f"the last start of {run_dir} ended with {job.statuses}; see {folder / run_dir}/logs")


def _step(run_dir: Path) -> int:
    newest = latest_checkpoint(run_dir)
    return step_of(newest) if newest else 0


def lines(file: Path) -> list[dict]:
    """The objects of a file with one on each line."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def check_ids(folder: Path, run_dir: str, last: int) -> None:
    """Every step was delivered once, with the samples of `preview`."""
    config = compose([*arguments(folder, run_dir, *SETTINGS, *NO_DROPOUT), f"train.max_steps={last}"])
    reader, order, refused, _ = open_run(config)
    of_ranks = [lines(folder / run_dir / "samples" / f"rank-{rank:05d}.jsonl") for rank in range(2)]
    assert all(len({line["step"] for line in one}) == len(one) for one in of_ranks), "a step stands twice"
    first, second = ({line["step"]: line["ids"] for line in one} for one in of_ranks)
    for step in range(1, last + 1):
        delivered = first[step] + second.get(step, [])
        assert delivered == queries.preview(reader, order, refused, step), f"step {step} had other samples"
    assert len(first) == last
    print(f"{run_dir}: the ids of all {last} steps are those of preview", flush=True)


def check_loss(folder: Path, one: str, other: str) -> None:
    """Every step stands once, with about the same loss."""
    runs = [lines(folder / run_dir / "metrics.jsonl") for run_dir in (one, other)]
    assert [line["step"] for line in runs[0]] == [line["step"] for line in runs[1]] == list(range(1, len(runs[0]) + 1))
    furthest = max(abs(a["loss"] - b["loss"]) for a, b in zip(*runs, strict=True))
    print(f"{one}: the loss of a step differs by {furthest:.2e} at most from the run never killed", flush=True)
    assert furthest < TOLERANCE


def check_equal(folder: Path, one: str, other: str) -> None:
    """Bit for bit."""
    from rank_preemption import equal, results

    last = _step(folder / one)
    assert equal(results(folder / one, 2, last), results(folder / other, 2, last)), "other results than never killed"
    print(f"{one}: metrics, samples and weights after {last} steps equal those of the run never killed", flush=True)


def main() -> None:
    """Both forms."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder to work in; it must not exist")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    folder: Path = asked.folder.resolve()
    write_shards(folder)
    draw = random.Random(asked.seed)
    last = survive(folder, "changing", asked.kills, True, draw)
    run(folder, "whole-changing", last, [*SETTINGS, *NO_DROPOUT])
    check_ids(folder, "changing", last)
    check_loss(folder, "changing", "whole-changing")
    last = survive(folder, "same", asked.kills, False, draw)
    run(folder, "whole-same", last, SETTINGS)
    check_equal(folder, "same", "whole-same")


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":
        sys.exit("set OMP_NUM_THREADS=1: results depend on the number of threads")
    main()

"""Training whose ranks, or their launcher, are killed with SIGKILL at random moments, saves and starts included.

The first kill of a start is survived by the launcher, which starts the ranks again; after the second one training is
started anew. `changing`: the number of ranks (2, 1, 2, …), the ZeRO stage and the way of saving are then others. At
the end the ids of every step are those of `preview`, and the loss of every step is that of a run that was never
killed, within TOLERANCE. `same`: nothing changes; metrics, samples and weights are equal bit for bit.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rank_jobs import RankJob, alive
from rank_training import arguments
from soak.jobs import (
    check_equal,
    expect,
    is_saving,
    lines,
    newest_step,
    ranks_of,
    train,
    train_to_the_end,
)

from crossguard.configs.compose import compose
from crossguard.configs.errors import EXIT_FAILED
from crossguard.data.loading import queries
from crossguard.recipes.sample_queries import open_run

# What another number of ranks rounds otherwise is a tenth of it after 650 steps.
TOLERANCE = 1e-6
# How long a kill may take to end, or to restart, everything.
SECONDS_TO_END = 30.0
SECONDS_TO_SAVE = 120.0
SETTINGS = ["train.num_workers=0", "checkpoint.every_steps=5", "checkpoint.keep_last=2"]
# Random numbers of dropout belong to a rank: with other ranks the loss would be another one. At ten times this learning
# rate 110 posts are learned by heart, and after 200 steps a last digit decides.
NO_DROPOUT = [
    *("model.text.config.hidden_dropout_prob=0", "+model.text.config.attention_probs_dropout_prob=0"),
    *("model.fusion.dropout=0", "train.lr=1e-4"),
]
# How many of ten kills come while ranks start, how many while a state is saved.
OF_TEN_STARTING, OF_TEN_SAVING = 2, 3


@dataclass
class Killer:
    """Kills what belongs to a run."""

    run_dir: Path
    draw: random.Random
    met: Counter[str] = field(default_factory=Counter)
    # Seconds from a kill until everything has ended or begins again.
    slowest: float = 0.0

    def strike(self, job: RankJob, ranks: int) -> bool:
        """Kill a rank, or now and then the launcher, at a random moment; whether the launcher is left."""
        self.wait(job, lambda: len(ranks_of(job)) == ranks, SECONDS_TO_END)
        pids = ranks_of(job)
        self._wait_for_moment(job)
        launcher = self.draw.random() < 0.1
        killed = job.pids[0] if launcher else self.draw.choice(pids)
        os.kill(killed, signal.SIGKILL)
        since = time.monotonic()
        self.met["of the launcher" if launcher else "of a rank"] += 1
        self.met["in a save"] += is_saving(self.run_dir)
        self.wait(None, lambda: not any(map(alive, pids)), SECONDS_TO_END)
        self.slowest = max(self.slowest, time.monotonic() - since)
        return not launcher

    def _wait_for_moment(self, job: RankJob) -> None:
        """In the start, in a save, or anywhere after one that a new state was saved."""
        chosen = self.draw.randrange(10)
        if chosen < OF_TEN_STARTING:
            time.sleep(self.draw.uniform(0, 2))
            return
        before = newest_step(self.run_dir)
        self.wait(job, lambda: newest_step(self.run_dir) > before, SECONDS_TO_SAVE)
        if chosen < OF_TEN_STARTING + OF_TEN_SAVING:
            self.wait(job, lambda: is_saving(self.run_dir), SECONDS_TO_SAVE)
            time.sleep(self.draw.uniform(0, 0.002))
        else:
            time.sleep(self.draw.uniform(0, 0.5))

    def wait(self, job: RankJob | None, condition: Callable[[], bool], seconds: float) -> None:
        """Until something is so; a job that ends before that, or takes longer, ends this program."""
        deadline = time.monotonic() + seconds
        while not condition():
            if job is not None:
                expect(not job.over(), job, self.run_dir)
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.run_dir}: nothing happens for {seconds} s" + (job.said() if job else ""))
            time.sleep(0.001)


def survive(folder: Path, run_dir: str, kills: int, changing: bool, draw: random.Random) -> int:
    """Kill so often, then go on to the end; returns the last step."""
    killer, started = Killer(folder / run_dir, draw), 0
    while killer.met["of a rank"] < kills:
        ranks, stage = (2 - started % 2, draw.randrange(4)) if changing else (2, 1)
        settings = [*settings_of(changing), f"zero={stage}"]
        if changing:
            settings.append(f"checkpoint.async_save={str(draw.random() < 0.5).lower()}")
        with train(folder, run_dir, settings, ranks=ranks, restarts=1) as job:
            if killer.strike(job, ranks):
                killer.wait(job, lambda: "restart 1 of 1" in job.errors, SECONDS_TO_END)
                if killer.strike(job, ranks):
                    expect(job.wait(SECONDS_TO_END) == [EXIT_FAILED], job, killer.run_dir)
                    expect(
                        "was ended by SIGKILL (is memory short?) (after 1 restarts)" in job.errors, job, killer.run_dir
                    )
        started += 1
        print(
            f"{run_dir}: {dict(killer.met)}, {ranks} ranks, stage {stage}, step {newest_step(killer.run_dir)}",
            flush=True,
        )
    last = newest_step(killer.run_dir) + 10
    train_to_the_end(folder, run_dir, settings_of(changing), last)
    print(f"{run_dir}: kills: {dict(killer.met)}; everything had ended within {killer.slowest:.2f} s", flush=True)
    return last


def settings_of(changing: bool) -> list[str]:
    """Of all starts."""
    return [*SETTINGS, *(NO_DROPOUT if changing else ())]


def check_ids(folder: Path, run_dir: str, last: int) -> None:
    """Every step was delivered once, with the samples of `preview`."""
    config = compose([*arguments(folder, run_dir, *settings_of(True)), f"train.max_steps={last}"])
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


def changing(folder: Path, kills: int, draw: random.Random) -> None:
    """The first form."""
    last = survive(folder, "changing", kills, True, draw)
    train_to_the_end(folder, "never-killed-changing", settings_of(True), last)
    check_ids(folder, "changing", last)
    check_loss(folder, "changing", "never-killed-changing")


def same(folder: Path, kills: int, draw: random.Random) -> None:
    """The second form."""
    last = survive(folder, "same", kills, False, draw)
    train_to_the_end(folder, "never-killed-same", settings_of(False), last)
    check_equal(folder, "same", "never-killed-same", last)

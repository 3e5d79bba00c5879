"""Run on ranks by test_preemption.py and `make soak`: training that is asked to stop, case by case in one process.

A case stops one rank at one moment of one phase, sees all ranks stop after one step, and goes on to the end.
"""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rank_training import arguments

from crossguard.configs.compose import compose
from crossguard.configs.errors import Preempted
from crossguard.configs.parent_death import die_with_parent
from crossguard.configs.schema import Config
from crossguard.train import phases, preemption
from crossguard.train.checkpoint_folder import latest_checkpoint, step_of
from crossguard.train.evaluation.stage import run_evaluation
from crossguard.train.metrics_log import metrics_file, samples_file
from crossguard.train.ranks import Ranks, end_process, init_ranks
from crossguard.train.stored_weights import load_weights
from crossguard.train.training import run_training

STEPS = 8
# The last step has an evaluation and a save, another has both, two have one of them.
SETTINGS = [
    *(f"train.max_steps={STEPS}", "evaluation.every_steps=4", "evaluation.batch_size=4"),
    *("checkpoint.every_steps=3", "train.num_workers=0"),
]
# Phase -> how often a run of one rank enters it.
PHASES = {"data": 8, "forward": 16, "backward": 16, "step": 8, "evaluation": 10, "save": 4}
# The step that a phase belongs to when it is entered for the n-th time: two passes a step; an evaluation begins, and has
# four batches.
STEP_OF = {
    "data": lambda n: n,
    "forward": lambda n: (n + 1) // 2,
    "backward": lambda n: (n + 1) // 2,
    "step": lambda n: n,
    "evaluation": lambda n: 4 if n <= 5 else 8,
    "save": lambda n: (3, 4, 6, 8)[n - 1],
}


@contextmanager
def struck(phase: str, number: int, delay: float) -> Iterator[None]:
    """This process gets both signals when it enters a phase for the `number`-th time, or `delay` seconds later."""
    left = number

    def strike(name: str) -> None:
        nonlocal left
        left -= name == phase
        if name == phase and left == 0:
            for sent in (signal.SIGTERM, signal.SIGUSR1):
                threading.Timer(delay, os.kill, (os.getpid(), sent)).start() if delay else os.kill(os.getpid(), sent)

    with phases.listening(strike):
        yield


@cache
def settings(folder: Path) -> Config:
    """Of all runs: composing them takes as long as the steps."""
    return compose(arguments(folder, "whole", *SETTINGS))


def train(folder: Path, run_dir: str, ranks: Ranks) -> int | None:
    """The step after which training was stopped, or None when it came to its end."""
    preemption._Rank.asked_at = None
    try:
        run_training(replace(copy.deepcopy(settings(folder)), run_dir=str(folder / run_dir)), ranks)
    except Preempted:
        newest = latest_checkpoint(folder / run_dir)
        return step_of(newest) if newest else 0
    return None


def evaluate(folder: Path, ranks: Ranks) -> str | None:
    """The report's figures, or None when the evaluate stage was stopped."""
    preemption._Rank.asked_at = None
    try:
        run_evaluation(copy.deepcopy(settings(folder)), ranks)
    except Preempted:
        return None
    return (folder / "whole" / "report" / "metrics.json").read_text() if ranks.is_first else ""


def evaluation_cases(folder: Path, ranks: Ranks, times: int) -> None:
    """The same with the evaluate stage, which is done anew after it was stopped."""
    whole = evaluate(folder, ranks)
    for number in range(1, times + 1):
        with struck("evaluation", number, 0) if ranks.rank == number % 2 else struck("", 0, 0):
            stopped = ranks.gather(evaluate(folder, ranks) is None)
        again = evaluate(folder, ranks)
        if ranks.is_first:
            print(json.dumps({"phase": "stage=evaluate", "stopped": stopped, "equal": again == whole}), flush=True)


def results(run_dir: Path, num_ranks: int, last: int) -> tuple[Any, ...]:
    """What must not depend on whether a run was stopped: the metrics of every step and evaluation, samples, weights."""
    timed = {"samples_per_second", "tokens_per_second", "data_wait", "memory_mb"}
    lines = [json.loads(line) for line in metrics_file(run_dir).read_text().splitlines()]
    metrics = [{name: line[name] for name in line.keys() - timed if not name.startswith("time.")} for line in lines]
    samples = [samples_file(run_dir, rank).read_text() for rank in range(num_ranks)]
    return metrics, samples, load_weights(run_dir / "checkpoints" / f"step-{last:08d}")


def equal(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Bit for bit."""
    same_weights = all(torch.equal(one[2][name], other[2][name]) for name in one[2])
    return one[:2] == other[:2] and one[2].keys() == other[2].keys() and same_weights


def cases(times: int, draw: random.Random, spread: float) -> Iterator[tuple[str, int, int, float]]:
    """(phase, number, rank, delay): each phase `times` times, at moments that together cover the run."""
    for phase, entered in PHASES.items():
        for time in range(times):
            number = draw.randint(1, entered) if spread else 1 + (entered - 1) * time // max(1, times - 1)
            yield phase, number, time % 2, draw.uniform(0, spread)


def main(folder: Path, times: int, spread: float) -> None:
    """Rank 0 prints one line for each case."""
    die_with_parent()
    ranks = init_ranks()
    train(folder, "whole", ranks)
    whole = results(folder / "whole", ranks.world_size, STEPS)
    evaluation_cases(folder, ranks, times)
    for phase, number, rank, delay in cases(times, random.Random(0), spread):
        run_dir = f"{phase}-{number}-{rank}-{delay}"
        with struck(phase, number, delay) if ranks.rank == rank else struck("", 0, 0):
            stopped = train(folder, run_dir, ranks)
        if delay:
            ranks.gather(threading.Event().wait(spread))  # A signal that came too late is not one for the next run.
        at = ranks.gather(stopped)
        went_on = ranks.gather(train(folder, run_dir, ranks)) if stopped is not None else [None]
        found = {
            "phase": phase,
            "number": number,
            "rank": rank,
            "stopped": at,
            "ended": went_on == [None] * len(went_on),
        }
        found["equal"] = equal(results(folder / run_dir, ranks.world_size, STEPS), whole)
        if ranks.is_first:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    with preemption.heeding(), preemption.holding():  # A signal that comes late must not end this process.
        main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
    end_process(0)

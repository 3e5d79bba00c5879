"""Training that is asked to stop at random moments of its steps, its evaluations and its saves, and goes on each time.

Every time all ranks must end with status 75 after one step, which is saved; the launcher's is then 75, too. The run
that was stopped so often equals, bit for bit, the one that never was.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

from soak.jobs import check_equal, newest_step, train, train_to_the_end

from crossguard.configs.errors import EXIT_PREEMPTED

SECONDS = 120.0
SETTINGS = [
    *("train.num_workers=0", "checkpoint.every_steps=4", "evaluation.every_steps=3", "evaluation.batch_size=4"),
    *("checkpoint.keep_last=2", "train.loss.name=soak.striking_loss:loss"),
]
PHASES = {"training": ("data", "forward", "backward", "step"), "evaluation": ("evaluation",), "saving": ("save",)}
# The signal comes up to so many seconds after its phase has begun.
SPREAD = 0.005


def stop_often(folder: Path, times: int, draw: random.Random) -> None:
    """So many times in each of PHASES, in turn; ends this program where one of them goes otherwise than it should."""
    asked, good = Counter[str](), Counter[str]()
    for number in range(1, times * len(PHASES) + 1):
        name = list(PHASES)[number % len(PHASES)]
        asked[name] += 1
        good[name] += is_stopped(folder, number, draw.choice(PHASES[name]), draw)
    for name, count in asked.items():
        print(f"stopped: {name}: {good[name]} of {count} ended at one step with status {EXIT_PREEMPTED}", flush=True)
    if good != asked:
        raise SystemExit(f"see {folder / 'stopped'}/logs")
    last = newest_step(folder / "stopped") + 5
    for run_dir in ("stopped", "never-stopped"):
        train_to_the_end(folder, run_dir, SETTINGS, last)
    check_equal(folder, "stopped", "never-stopped", last)


def is_stopped(folder: Path, number: int, phase: str, draw: random.Random) -> bool:
    """Whether all ranks stop as they should when one is asked to; every other time there is a launcher above them."""
    strike = {"phase": phase, "times": draw.randint(1, 8), "rank": draw.randrange(2), "delay": draw.uniform(0, SPREAD)}
    launched = number % 2 == 0
    environment = {"STRIKE": json.dumps(strike)}
    with train(folder, "stopped", SETTINGS, ranks=2, launched=launched, environment=environment) as job:
        statuses = job.wait(SECONDS)
    logs = [folder / "stopped" / "logs" / f"rank-{rank:05d}.log" for rank in range(2)]
    steps = [re.findall(r"stopped after step (\d+), which is saved", log.read_text()) for log in logs]
    good = set(statuses) == {EXIT_PREEMPTED} and steps[0] == steps[1] and len(steps[0]) == number
    good = good and int(steps[0][-1]) == newest_step(folder / "stopped")
    if not good:
        print(f"{strike}: statuses {statuses}, steps {steps}\n{job.said()}", flush=True)
    return good

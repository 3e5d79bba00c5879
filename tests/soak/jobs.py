"""Training as `crossguard train` runs it, launcher included; only are its ranks forked instead of started."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rank_jobs import RankJob
from rank_preemption import equal, results
from rank_training import arguments

from crossguard.train.checkpoint_folder import latest_checkpoint, step_of

ENDLESS = 100_000
LONGEST = 3600.0
TESTS = Path(__file__).parent.parent


def train(
    folder: Path,
    run_dir: str,
    settings: Sequence[str],
    *,
    ranks: int,
    restarts: int = 0,
    last: int = ENDLESS,
    launched: bool = True,
    environment: Mapping[str, str] | None = None,
) -> RankJob:
    """Start it; with `launched=False` the ranks alone."""
    launcher = (f"launcher.num_procs={ranks}", f"launcher.max_restarts={restarts}", "launcher.threads_per_proc=1")
    settings = [*settings, *launcher, f"train.max_steps={last}", f"train.schedule_steps={ENDLESS}"]
    line = ["crossguard.recipes.cli", "train"] if launched else ["crossguard.train"]
    line = ["-m", *line, *arguments(folder, run_dir, *settings)]
    return RankJob(line, 0 if launched else ranks, environment, cwd=TESTS)


def train_to_the_end(folder: Path, run_dir: str, settings: Sequence[str], last: int) -> None:
    """On 2 ranks, up to a step."""
    with train(folder, run_dir, [*settings, "zero=1"], ranks=2, last=last) as job:
        expect(job.wait(LONGEST) == [0], job, folder / run_dir)


def expect(right: bool, job: RankJob, run_dir: Path) -> None:
    """End this program where something is wrong."""
    if not right:
        raise SystemExit(f"ended with {job.statuses}; see {run_dir}/logs\n{job.said()}")


def ranks_of(job: RankJob) -> list[int]:
    """The processes that its launcher has started and that are left."""
    (launcher,) = job.pids
    try:
        return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def newest_step(run_dir: Path) -> int:
    """That is saved."""
    newest = latest_checkpoint(run_dir)
    return step_of(newest) if newest else 0


def is_saving(run_dir: Path) -> bool:
    """A save is under way, or was when the ranks were killed."""
    return any((run_dir / "checkpoints").glob(".staging-*"))


def lines(file: Path) -> list[dict]:
    """The objects of a file with one on each line."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def check_equal(folder: Path, one: str, other: str, last: int) -> None:
    """Metrics, samples and weights, bit for bit."""
    if not equal(results(folder / one, 2, last), results(folder / other, 2, last)):
        raise SystemExit(f"{one}: other results than {other}, see {folder}")
    print(f"{one}: metrics, samples and weights after {last} steps equal those of {other}, bit for bit", flush=True)

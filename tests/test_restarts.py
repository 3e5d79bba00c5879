"""One job of the local launcher that loses ranks in every way: it goes on until it is asked to stop."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from rank_jobs import RankJob, wait_until
from rank_training import arguments, write_shards

from crossguard.configs.errors import (
    EXIT_FAILED,
    EXIT_OUT_OF_MEMORY,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    JobError,
    OutOfMemory,
    Preempted,
    UserError,
)
from crossguard.launchers.local import _outcome
from crossguard.train.checkpoint_folder import latest_checkpoint, step_of

HERE = Path(__file__).parent
SETTINGS = [
    *("launcher.num_procs=2", "launcher.max_restarts=2", "launcher.elastic=true", "train.step_timeout=8"),
    *("train.max_steps=1000000", "checkpoint.every_steps=2", "train.loss.name=failing_loss:loss"),
]


class Job(RankJob):
    """`crossguard train` in a process of its own; only are it and its ranks forked instead of started."""

    def __init__(self, folder: Path):
        self.run_dir, self.compiled = folder / "run", folder / "compiled"
        line = ["-m", "crossguard.recipes.cli", "train", *arguments(folder, "run", *SETTINGS)]
        environment = {"HUNG_BEFORE": str(folder / "hung"), "TORCH_EXTENSIONS_DIR": str(self.compiled)}
        super().__init__(line, 0, environment, HERE)

    def ranks(self) -> list[psutil.Process]:
        return psutil.Process(self.pids[0]).children()

    def steps(self) -> int:
        newest = latest_checkpoint(self.run_dir)
        return step_of(newest) if newest else 0

    def wait_for(self, condition: Callable[[], bool]) -> None:
        wait_until(lambda: condition() or self.over(), 120)
        assert not self.over(), self.said()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Rank 1 has hung, then on its second start was killed, then the launcher was asked to stop."""
    folder = tmp_path_factory.mktemp("job")
    write_shards(folder)
    with Job(folder) as job:
        job.wait_for(lambda: "restart 1 of 2\n" in job.errors)
        before = job.steps()
        job.wait_for(lambda: job.steps() > before + 2)
        job.ranks()[1].kill()
        job.wait_for(lambda: "restart 2 of 2\n" in job.errors)
        before = job.steps()
        job.wait_for(lambda: job.steps() > before + 2)
        os.kill(job.pids[0], signal.SIGUSR1)
        job.wait(60)
    return job


def test_a_hanging_rank_says_where_and_is_started_again(job: Job) -> None:
    said = job.errors
    assert "crossguard: rank 1: hangs in 'forward' for more than 8 s (train.step_timeout)" in said
    assert "crossguard: rank 0: hangs in 'waiting for the other ranks'" in said
    # Whichever of them ends first.
    assert "was ended by SIGALRM (it hung); restart 1 of 2\n" in said
    assert "in hang_for_good" in (job.run_dir / "logs" / "rank-00001.log").read_text()


def test_a_killed_rank_is_named_and_the_job_goes_on_with_fewer(job: Job) -> None:
    said = job.errors
    lost = "crossguard: rank 1 was ended by SIGKILL (is memory short?); restart 2 of 2\n"
    assert f"{lost}crossguard: going on with 1 of 2 ranks\n" in said
    assert said.count("train: going on after step") == 2
    assert "Traceback" not in said


def test_the_launcher_passes_on_a_request_to_stop(job: Job) -> None:
    assert job.statuses == {0: EXIT_PREEMPTED}
    said = job.errors
    assert f"crossguard: train: stopped after step {job.steps()}, which is saved; start again" in said
    assert said.endswith("crossguard: preempted; start again and it goes on where it stopped\n")
    lines = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, job.steps() + 1))


def test_no_start_waits_for_a_compiler(job: Job) -> None:
    """DeepSpeed has operators that it compiles when ranks first meet."""
    assert job.steps() > 0
    assert not job.compiled.exists()


@pytest.mark.parametrize(
    ("ended", "asked", "outcome"),
    [
        ({0: 0, 1: 0}, False, None),
        ({0: 0, 1: 0}, True, Preempted),
        ({1: EXIT_PREEMPTED}, False, Preempted),
        ({0: EXIT_FAILED, 1: EXIT_PREEMPTED}, False, Preempted),
        ({1: -signal.SIGTERM}, False, Preempted),
        ({1: -signal.SIGKILL}, True, Preempted),
        ({0: EXIT_USER_ERROR, 1: EXIT_FAILED}, False, UserError),
        ({0: EXIT_FAILED, 1: EXIT_FAILED}, False, JobError),
        ({0: EXIT_FAILED}, True, JobError),
        ({0: EXIT_FAILED, 1: EXIT_OUT_OF_MEMORY}, False, OutOfMemory),
        ({0: -signal.SIGABRT, 1: EXIT_OUT_OF_MEMORY}, False, OutOfMemory),
        ({1: EXIT_OUT_OF_MEMORY}, True, Preempted),
        ({0: EXIT_PREEMPTED, 1: EXIT_OUT_OF_MEMORY}, False, Preempted),
    ],
)
def test_what_the_ends_of_ranks_mean(ended: dict[int, int], asked: bool, outcome: type[Exception] | None) -> None:
    if outcome is None:
        assert _outcome(ended, asked) == ""
    else:
        with pytest.raises(outcome):
            _outcome(ended, asked)

"""A job on two SLURM nodes: stopped in every way that SLURM has, it comes back and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from build_job import build, files_of, make_config, make_posts, write_lines
from executor_tasks import die, fail, square
from launched_job import HERE, Launched, job, losses, wait_for
from rank_jobs import run_crossguard
from slurm_cluster import slurm_cluster
from waiting_loss import wait_in

from crossguard.configs.errors import JobError, UserError
from crossguard.data.shards import slurm_array
from crossguard.data.shards.slurm_array import SlurmArray

pytestmark = pytest.mark.slurm
SETTINGS = ["launcher=slurm", "launcher.nodes=2", "launcher.gpus_per_node=0", "launcher.slurm.partition=main"]


@dataclass(frozen=True)
class Cluster:
    """Where SLURM runs, and the folder of the jobs."""

    folder: Path

    def submit(self, run_dir: str, *settings: str) -> str:
        """Submit the job; returns its number."""
        run_crossguard(["launch", *job(self.folder, run_dir, *SETTINGS, *settings)], HERE)
        return json.loads((self.folder / run_dir / "launch" / "submitted.json").read_text())["jobs"][-1]

    def ask(self, question: str, run_dir: str) -> str:
        """`crossguard launch status`, `logs` or `cancel`."""
        return run_crossguard(["launch", question, f"run_dir={self.folder / run_dir}"], HERE).stdout

    def wait_until_started(self, run_dir: str, file: Path) -> None:
        """Until a start of the job waits in the middle of training."""
        wait_for(file.exists, lambda: self.ask("status", run_dir) + self.ask("logs", run_dir))

    def begin_again(self, number: str, run_dir: str, *changes: str) -> None:
        """SLURM lets a requeued job rest for two minutes. Here it gets as long as nodes need: they refuse a job in the
        second in which they ended it."""
        wait_for(lambda: self.state(number) == "PENDING", lambda: self.ask("logs", run_dir))
        _slurm("scontrol", "update", f"JobId={number}", "StartTime=now+3", *changes)

    def wait_until_done(self, number: str, run_dir: str) -> None:
        """Until the job has ended well."""
        wait_for(lambda: self.state(number) in ("COMPLETED", "FAILED"), lambda: self.ask("logs", run_dir))
        assert self.state(number) == "COMPLETED", self.ask("logs", run_dir)

    def state(self, number: str) -> str:
        """As SLURM has it."""
        fields = dict(field.partition("=")[::2] for field in _slurm("scontrol", "-o", "show", "job", number).split())
        return fields["JobState"]


@pytest.fixture(scope="module")
def cluster(launched: Launched, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster, where this machine can have one."""
    with pytest.MonkeyPatch.context() as patched:
        try:
            with slurm_cluster(tmp_path_factory.mktemp("slurm")) as environment:
                patched.setenv("SLURM_CONF", environment["SLURM_CONF"])
                yield Cluster(launched.folder)
        except RuntimeError as reason:
            pytest.skip(str(reason))


@pytest.fixture(scope="module")
def expected(launched: Launched, cluster: Cluster) -> list[float]:
    """The losses of local ranks."""
    return launched.expected


def test_a_job_that_is_asked_to_stop_comes_back(cluster: Cluster, expected: list[float]) -> None:
    """SIGUSR1 to the script is how SLURM announces the time limit."""
    waits = cluster.folder / "asked-waits"
    number = cluster.submit("asked", wait_in(waits, 1))
    cluster.wait_until_started("asked", waits / "waiting-0")
    assert f"{number}: running on n[1-2]" in cluster.ask("status", "asked")
    _slurm("scancel", "--batch", "--signal=USR1", number)
    cluster.begin_again(number, "asked")
    cluster.wait_until_done(number, "asked")
    said = cluster.ask("logs", "asked")
    assert said.count("train: going on after step") == 1
    assert "export: bundle ->" in said
    assert f"{number}: completed, exit status 0" in cluster.ask("status", "asked")
    assert losses(cluster.folder, "asked") == expected


def test_an_unknown_partition_is_one_line(cluster: Cluster) -> None:
    line = ["launch", *job(cluster.folder, "wrong", *SETTINGS, "launcher.slurm.partition=mian")]
    done = run_crossguard(line, HERE, status=2)
    expected = "launcher.slurm.partition=mian: SLURM has no such partition; did you mean 'main'?"
    assert done.stderr == f"crossguard: {expected}\n"


def test_a_job_array_builds_what_processes_build(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
    posts = write_lines(tmp_path / "posts.jsonl", make_posts(40))
    whole = build(make_config(posts, samples_per_shard=8), tmp_path / "whole")
    settings = {"samples_per_shard": 8, "num_workers": 2, "executor": "slurm", "slurm_options": ["--partition=main"]}
    assert build(make_config(posts, **settings), tmp_path / "array") == whole
    assert files_of(tmp_path / "array/shards") == files_of(tmp_path / "whole/shards")
    with pytest.raises(UserError, match="^1 is wrong$"):
        list(SlurmArray(1, []).run(fail, [1, 1]))
    monkeypatch.setattr(slurm_array, "SECONDS_TO_SEE", 1)
    with pytest.raises(JobError, match="a worker process was killed"):
        list(SlurmArray(2, []).run(die, [1, 2]))
    with pytest.raises(UserError, match="^build.executor=slurm: sbatch: error: invalid partition"):
        list(SlurmArray(1, ["--partition=mian"]).run(square, [1]))
    assert not list(tmp_path.glob(".build-array-*"))


@pytest.mark.launchers
def test_a_job_that_is_requeued_and_reaches_its_time_limit_is_one_run(cluster: Cluster, expected: list[float]) -> None:
    waits = cluster.folder / "twice-waits"
    settings = [wait_in(waits, 2), "tracker.name=wandb", "launcher.grace_seconds=10", "train.restart=true"]
    number = cluster.submit("twice", *settings, "launcher.slurm.time=30")
    cluster.wait_until_started("twice", waits / "waiting-0")
    _slurm("scontrol", "requeue", number)
    cluster.begin_again(number, "twice")
    cluster.wait_until_started("twice", waits / "waiting-1")
    _slurm("scontrol", "update", f"JobId={number}", "TimeLimit=2")  # The signal comes 100 seconds before it is over.
    cluster.begin_again(number, "twice", "TimeLimit=30")
    cluster.wait_until_done(number, "twice")
    assert cluster.ask("logs", "twice").count("train: going on after step") == 2
    assert losses(cluster.folder, "twice") == expected
    runs = {folder.name.rpartition("-")[2] for folder in (cluster.folder / "twice" / "wandb").glob("offline-run-*")}
    assert len(runs) == 1


@pytest.mark.launchers
def test_a_job_that_makes_room_for_an_urgent_one_comes_back(cluster: Cluster, expected: list[float]) -> None:
    """SLURM's own preemption: SIGTERM, to the ranks alone, and a while later the end."""
    waits = cluster.folder / "preempted-waits"
    number = cluster.submit("preempted", wait_in(waits, 1))
    cluster.wait_until_started("preempted", waits / "waiting-0")
    silent = ("--output=/dev/null", "--wrap=true")
    urgent = _slurm("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", *silent).strip()
    cluster.begin_again(number, "preempted")
    cluster.wait_until_done(number, "preempted")
    assert cluster.state(urgent) == "COMPLETED"
    said = cluster.ask("logs", "preempted")
    assert "which is saved; start again" in said
    assert said.count("train: going on after step") == 1
    assert losses(cluster.folder, "preempted") == expected


@pytest.mark.launchers
def test_ranks_that_died_on_one_node_start_again(cluster: Cluster, expected: list[float]) -> None:
    """Those of the other node, which cannot know, are ended in time."""
    waits = cluster.folder / "lost-waits"
    number = cluster.submit("lost", wait_in(waits, 1), "launcher.max_restarts=1")
    cluster.wait_until_started("lost", waits / "waiting-0")
    ranks = [process for process in psutil.process_iter(["cmdline"]) if _is_rank(process, str(cluster.folder / "lost"))]
    killed = [rank for rank in ranks if rank.environ()["SLURM_NODEID"] == "1"]
    assert len(killed) == 1
    killed[0].kill()
    cluster.wait_until_done(number, "lost")
    assert "a rank was ended by SIGKILL (is memory short?); restart 1 of 1" in cluster.ask("logs", "lost")
    assert losses(cluster.folder, "lost") == expected


@pytest.mark.launchers
def test_a_cancelled_job_stays_away(cluster: Cluster) -> None:
    waits = cluster.folder / "cancelled-waits"
    number = cluster.submit("cancelled", wait_in(waits, 1))
    cluster.wait_until_started("cancelled", waits / "waiting-0")
    again = ["launch", *job(cluster.folder, "cancelled", *SETTINGS)]
    assert f"in the queue as slurm {number}" in run_crossguard(again, HERE, status=2).stderr
    cluster.ask("cancel", "cancelled")
    wait_for(lambda: cluster.state(number) == "CANCELLED", lambda: cluster.ask("logs", "cancelled"))
    wait_for(lambda: not _slurm("squeue", "--noheader"), lambda: _slurm("squeue"))
    assert "is saved; start again" in cluster.ask("logs", "cancelled")
    assert cluster.state(number) == "CANCELLED"


@pytest.mark.launchers
def test_a_sweep_is_an_array_on_shards_that_are_built_once(cluster: Cluster) -> None:
    line = ["launch", "--multirun", *job(cluster.folder, "sweep", "launcher=slurm")]
    line = [word for word in line if not word.startswith("data.shards=")]
    line += ["launcher.gpus_per_node=0", "launcher.slurm.cpus_per_task=1", "train.lr=1e-2,1e-3"]
    run_crossguard(line, HERE)
    folder = cluster.folder / "sweep"
    build, array = json.loads((folder / "launch" / "submitted.json").read_text())["jobs"]
    wait_for(lambda: not _slurm("squeue", "--noheader"), lambda: _slurm("squeue"), 200)
    assert cluster.state(build) == "COMPLETED", cluster.ask("logs", "sweep")
    of_each = [losses(folder, name) for name in ("train.lr-0.01", "train.lr-0.001")]
    assert of_each[0] != of_each[1]
    assert not (folder / "train.lr-0.01" / "shards").exists()
    assert f"{build}: completed, exit status 0" in cluster.ask("status", "sweep")
    assert all(f"{array}_{task}: completed, exit status 0" in cluster.ask("status", "sweep") for task in (0, 1))


def _is_rank(process: psutil.Process, run_dir: str) -> bool:
    line = process.info["cmdline"] or []
    return line[1:3] == ["-m", "crossguard.train"] and f"run_dir={run_dir}" in line


def _slurm(*line: str) -> str:
    return subprocess.run(line, capture_output=True, text=True, check=True, env=os.environ).stdout

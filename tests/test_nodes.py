"""The launchers' parts for ranks elsewhere: what their ends mean, and nodes that wait for each other."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from crossguard.configs import cores
from crossguard.configs.errors import (
    EXIT_FAILED,
    EXIT_LOST_CONTACT,
    EXIT_OUT_OF_MEMORY,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    CrossguardError,
    JobError,
    OutOfMemory,
    Preempted,
    UserError,
)
from crossguard.configs.schema import LauncherConfig
from crossguard.configs.schema.launcher import SlurmConfig, TorchrunConfig
from crossguard.launchers import deepspeed, one_node, slurm, torchrun
from crossguard.launchers.environment import environment_of
from crossguard.launchers.launcher_output import LauncherOutput
from crossguard.launchers.statuses import outcome, status_of
from crossguard.launchers.supervised import restarting


@pytest.mark.parametrize(
    ("status", "asked", "expected"),
    [
        (0, False, ""),
        (0, True, Preempted),
        (EXIT_USER_ERROR, False, UserError),
        (EXIT_PREEMPTED, False, Preempted),
        (EXIT_FAILED, False, JobError),
        (EXIT_FAILED, True, JobError),
        (255, False, JobError),  # ssh, without a connection
        (128 + signal.SIGKILL, False, "a rank was ended by SIGKILL (is memory short?)"),
        (256 - signal.SIGKILL, False, "a rank was ended by SIGKILL (is memory short?)"),
        (128 + signal.SIGTERM, False, Preempted),
        (EXIT_LOST_CONTACT, False, "ranks lost contact with each other"),
        (EXIT_OUT_OF_MEMORY, False, OutOfMemory),
    ],
)
def test_what_another_launcher_s_status_means(status: int, asked: bool, expected: str | type[CrossguardError]) -> None:
    if isinstance(expected, str):
        assert outcome(status_of({status}), asked=asked) == expected
    else:
        with pytest.raises(expected):
            outcome(status_of({status}), asked=asked)


@pytest.mark.parametrize(
    ("statuses", "stands"),
    [
        ({EXIT_USER_ERROR, -signal.SIGKILL}, EXIT_USER_ERROR),
        ({EXIT_PREEMPTED, EXIT_FAILED}, EXIT_PREEMPTED),
        ({EXIT_OUT_OF_MEMORY, EXIT_LOST_CONTACT}, EXIT_OUT_OF_MEMORY),
        ({EXIT_FAILED, EXIT_LOST_CONTACT}, EXIT_FAILED),
        ({128 + signal.SIGKILL, EXIT_LOST_CONTACT}, 128 + signal.SIGKILL),
        ({0, EXIT_LOST_CONTACT}, EXIT_LOST_CONTACT),
        ({0}, 0),
    ],
)
def test_one_status_stands_for_those_of_all_ranks(statuses: set[int], stands: int) -> None:
    assert status_of(statuses) == stands


def test_ranks_are_started_again_as_often_as_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    starts: list[list[str]] = []
    became = iter(["", "lost", "", "lost again"])

    def start(arguments: list[str], restarts: int) -> str:
        starts.append(arguments)
        assert restarts == (len(starts) > 2)
        if lost := next(became):
            return lost
        raise OutOfMemory("rank 3 was out of memory")

    with pytest.raises(JobError, match=r"lost again \(after 1 restarts\)"):
        restarting(start, ["stage=train", "train.restart=true"], LauncherConfig(max_restarts=1))
    told = "crossguard: {}; starting again\ncrossguard: lost; restart 1 of 1\ncrossguard: {}; starting again\n"
    assert capsys.readouterr().err == told.format(*["rank 3 was out of memory"] * 2)
    assert ["train.restart=false" in arguments for arguments in starts] == [False, True, True, True]


def test_only_lost_ranks_are_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from crossguard.launchers import agent

    watching = agent.Agent.__new__(agent.Agent)
    for status, left in [
        (EXIT_FAILED, 0),
        (EXIT_USER_ERROR, 0),
        (EXIT_PREEMPTED, 0),
        (EXIT_OUT_OF_MEMORY, 4),
        (EXIT_LOST_CONTACT, 3),
        (-signal.SIGKILL, 3),
    ]:
        result = agent.RunResult(agent.WorkerState.FAILED, failures={0: SimpleNamespace(exitcode=status)})
        monkeypatch.setattr(agent.LocalElasticAgent, "_monitor_workers", lambda self, group, result=result: result)
        watching._remaining_restarts = 3
        watching._monitor_workers(None)
        assert watching._remaining_restarts == left, status


@contextmanager
def endpoint() -> Iterator[LauncherConfig]:
    """Two nodes that meet on this machine; the second one is played by a thread."""
    with socket.socket() as kept:  # As long as it is bound the port is given to nobody else who asks for any.
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{kept.getsockname()[1]}"
        yield LauncherConfig(name="torchrun", nodes=2, torchrun=TorchrunConfig(endpoint=endpoint))


@pytest.mark.parametrize("error", [None, UserError, Preempted, JobError, ZeroDivisionError])
def test_nodes_wait_for_the_one_that_builds(error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_node, "SECONDS_BETWEEN_TRIES", 0.1)
    with endpoint() as config, ThreadPoolExecutor() as pool:
        assert one_node.is_here(config)
        waiting = pool.submit(one_node.wait, config, "build")
        time.sleep(0.05)  # It has tried in vain, and tries again after the work has failed at once.
        with suppress(CrossguardError, ZeroDivisionError), one_node.at_work(config):
            with pytest.raises(UserError, match="another program listens on port"), one_node.at_work(config):
                pass
            if error is None or not issubclass(error, CrossguardError):
                time.sleep(0.3)
                assert not waiting.done()
            if error:
                raise error("the disk is full")
        if error is None:
            waiting.result(5)
        else:
            with pytest.raises(error if issubclass(error, CrossguardError) else JobError, match="which says why"):
                waiting.result(5)


def test_a_node_that_comes_late_finds_torchrun_s_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_node, "SECONDS_TO_GREET", 0.2)
    with endpoint() as config, socket.create_server(torchrun.endpoint_of(config)):
        one_node.wait(config, "build")
    monkeypatch.setattr(one_node, "SECONDS_TO_MEET", 0)
    with pytest.raises(JobError, match=r"nobody answers|refused"):
        one_node.wait(config, "build")


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        config = LauncherConfig(name="torchrun", nodes=2, torchrun=TorchrunConfig(endpoint=f"127.0.0.1:{port}"))
        with pytest.raises(UserError, match=f"another program listens on port {port} of this node"):
            torchrun.check_port(config)
        assert slurm.free_port() != port
    torchrun.check_port(config)
    # A name that leads nowhere yet may still be this machine's own.
    for host, here in [(socket.gethostname(), True), (f"{socket.gethostname()}.job", True), ("x.invalid", False)]:
        named = LauncherConfig(name="torchrun", nodes=2, torchrun=TorchrunConfig(endpoint=f"{host}:{port}"))
        assert torchrun.endpoint_is_here(named) == here
    # That of another machine is not looked at here.
    torchrun.check_port(LauncherConfig(name="torchrun", nodes=2, torchrun=TorchrunConfig(endpoint="192.0.2.77:1")))


def test_threads_share_out_the_cores_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    for quota, procs, threads in [
        (None, 2, "6"),
        ("max 100000", 2, "6"),
        ("850000 100000", 2, "4"),
        ("50000 100000", 4, "1"),
    ]:
        if quota:
            (tmp_path / "cpu.max").write_text(f"{quota}\n")
        assert environment_of(LauncherConfig(), procs)["OMP_NUM_THREADS"] == threads
    assert environment_of(LauncherConfig(threads_per_proc=3), 2)["OMP_NUM_THREADS"] == "3"


def test_ranks_in_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pyxis documents its options; the image has its own Python, and what ranks write lies outside of it."""
    monkeypatch.chdir(tmp_path)
    settings = SlurmConfig(container="nvcr.io#nvidia/pytorch:25.01-py3", container_mounts=["/posts:/posts:ro"])
    config = LauncherConfig(name="slurm", gpus_per_node=0, environment={"NCCL_DEBUG": "INFO"}, slurm=settings)
    variables = slurm._variables(2, config)
    for run_dir, mounts in [(Path("runs/a"), ""), (Path("/elsewhere/a"), "/elsewhere/a:/elsewhere/a,")]:
        line = slurm.command(["stage=train"], variables, config, run_dir)
        options = dict(word.split("=", 1) for word in line if word.startswith("--container"))
        assert options == {
            "--container-image": "nvcr.io#nvidia/pytorch:25.01-py3",
            "--container-mounts": f"{tmp_path}:{tmp_path},{mounts}/posts:/posts:ro",
            "--container-workdir": str(tmp_path),
            "--container-env": "OMP_NUM_THREADS,NCCL_DEBUG,MASTER_ADDR,MASTER_PORT,LOCAL_WORLD_SIZE",
        }
        assert line[-4:] == ["python3", "-m", "crossguard.train", "stage=train"]


def test_what_srun_says_is_sorted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LauncherOutput(tmp_path / "logs" / "srun.log", slurm.OWN, slurm.ENDED, grace_seconds=0) as output:
        output.hear("train: 6/6 steps")
        assert not output.overdue()
        output.hear("srun: error: n2: task 1: Exited with exit code 75")
        assert output.overdue()
        output.hear("srun: error: n1: tasks 0,2: Exited with exit code 2")
        output.hear("srun: error: n1: task 3: Killed")
        output.hear("srun: error: n1: task 4: Segmentation fault (core dumped)")
        output.hear("srun: error: n1: task 5: Out Of Memory")
        output.hear("srun: error: Node failure on n2")
    assert capsys.readouterr().err == "train: 6/6 steps\n"
    assert output.statuses == {EXIT_PREEMPTED, EXIT_USER_ERROR, 128 + signal.SIGKILL, 128 + signal.SIGSEGV}
    assert len((tmp_path / "logs" / "srun.log").read_text().splitlines()) == 6


def test_what_deepspeed_says_is_sorted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LauncherOutput(tmp_path / "log", deepspeed.OWN, deepspeed.ENDED, grace_seconds=0) as output:
        output.hear("[2026-11-22 07:46:28,570] [ERROR] [launch.py:259:sigkill_handler] exits with return code = 2")
        output.hear("pdsh@vm: 10.77.0.2: ssh exited with exit code 2")
        output.hear("pdsh@vm: interrupt (one more within 1 sec to abort)")
        output.hear("crossguard: rank 1: wrong")
    assert capsys.readouterr().err == "crossguard: rank 1: wrong\n"
    assert output.statuses == {EXIT_USER_ERROR}
    assert not output.overdue()  # Others may still be on their way.
    assert len((tmp_path / "log").read_text().splitlines()) == 3

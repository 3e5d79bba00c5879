"""Ranks on two hosts: torchrun's agent and DeepSpeed's launcher do the training that local ranks do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from launched_job import HERE, Launched, job, losses, wait_for
from two_hosts import SSH_PORT, Host, ssh_between, two_hosts
from waiting_loss import wait_in

from crossguard.configs.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER_ERROR
from crossguard.train.checkpoint_folder import latest_checkpoint, step_of

SECRET = "not-for-command-lines"


@pytest.fixture(scope="module")
def folder(launched: Launched, hosts: list[Host]) -> Path:
    """Of the job; there where there are hosts."""
    return launched.folder


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    """Two hosts, where this machine can have them."""
    try:
        with two_hosts() as hosts:
            yield hosts
    except RuntimeError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def expected(launched: Launched, hosts: list[Host]) -> list[float]:
    """The losses of local ranks."""
    return launched.expected


@pytest.fixture(scope="module")
def reachable(hosts: list[Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which the hosts reach each other over ssh."""
    try:
        with ssh_between(hosts, tmp_path_factory.mktemp("ssh")) as environment:
            yield environment
    except RuntimeError as reason:
        pytest.skip(str(reason))


def torchrun(
    hosts: list[Host], folder: Path, run_dir: str, *settings: str, command: str = "train"
) -> list[subprocess.Popen[bytes]]:
    """`crossguard train` on each host."""
    meeting = ["launcher=torchrun", "launcher.nodes=2", "launcher.num_procs=1"]
    meeting.append(f"launcher.torchrun.endpoint={hosts[0].address}:29400")
    return [
        host.start(
            [
                *("crossguard", command, *job(folder, run_dir, *meeting, *settings)),
                f"launcher.torchrun.local_addr={host.address}",
            ],
            said(folder, run_dir, number),
            cwd=HERE,
        )
        for number, host in enumerate(hosts)
    ]


def said(folder: Path, run_dir: str, host: int) -> Path:
    """Where a host's command says something."""
    return folder / f"{run_dir}-{host}.txt"


def ended(folder: Path, run_dir: str, processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Their exit statuses; all are ended by then."""
    try:
        return [process.wait(150) for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail("\n".join(said(folder, run_dir, host).read_text() for host in range(len(processes))))
    finally:
        for process in processes:
            process.kill()


def test_torchrun_on_two_hosts(hosts: list[Host], folder: Path, expected: list[float]) -> None:
    statuses = ended(folder, "torchrun", torchrun(hosts, folder, "torchrun"))
    assert statuses == [0, 0], said(folder, "torchrun", 0).read_text()
    assert losses(folder, "torchrun") == expected


@pytest.mark.launchers
def test_one_command_on_each_host_does_all_stages(hosts: list[Host], folder: Path, expected: list[float]) -> None:
    settings = [f"data.shards={folder}/whole/shards", "ablations={colder: ['train.lr=1e-3']}"]
    statuses = ended(folder, "whole", torchrun(hosts, folder, "whole", *settings, command="run"))
    first, second = (said(folder, "whole", number).read_text() for number in (0, 1))
    assert statuses == [0, 0], first + second
    assert losses(folder, "whole") == expected != losses(folder, "whole/ablations/colder")
    assert "shards -> " in first
    assert (folder / "whole" / "bundle").is_dir()
    assert f"build: done by the node of {hosts[0].address}:29400, for which this one waits" in second
    assert "export" not in second
    # What is wrong for the node that builds is told there, and ends the others.
    (folder / "wrong.jsonl").write_text("{}\n")
    settings = [f"data.path={folder}/wrong.jsonl", f"data.shards={folder}/wrong/shards"]
    assert ended(folder, "wrong", torchrun(hosts, folder, "wrong", *settings, command="run")) == [EXIT_USER_ERROR] * 2
    assert "wrong.jsonl:1: " in said(folder, "wrong", 0).read_text()
    assert "which says why" in said(folder, "wrong", 1).read_text()


@pytest.mark.launchers
def test_deepspeed_over_ssh(
    hosts: list[Host], folder: Path, expected: list[float], reachable: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = deepspeed(hosts, folder, "deepspeed", reachable)
    seen: set[str] = set()

    def looked() -> bool:
        seen.update(_command_lines())
        return process.poll() is not None

    wait_for(looked, lambda: said(folder, "deepspeed", 0).read_text())
    assert process.returncode == 0, said(folder, "deepspeed", 0).read_text()
    assert losses(folder, "deepspeed") == expected
    assert any("-u -m crossguard.train" in line for line in seen)
    assert not any(SECRET in line for line in seen)
    # The ranks had it all the same: rank 0 lives on the host of another ssh session.
    assert f"KEY={SECRET}" in (folder / "environ.txt").read_text()
    assert not list((folder / "deepspeed").glob(".environment-*"))


def deepspeed(
    hosts: list[Host], folder: Path, run_dir: str, environment: dict[str, str], *settings: str
) -> subprocess.Popen[bytes]:
    """`crossguard train` on the first host, for both."""
    line = ["crossguard", "train", *job(folder, run_dir, *over_ssh(hosts, folder), *settings)]
    environment = environment | own_environment(folder / "environ.txt")
    return hosts[0].start(line, said(folder, run_dir, 0), cwd=HERE, env=environment)


def over_ssh(hosts: list[Host], folder: Path) -> list[str]:
    """Settings for DeepSpeed's launcher on the hosts."""
    hostfile = folder / "hostfile"
    hostfile.write_text("# two hosts\n" + "".join(f"{host.address} slots=1\n" for host in hosts))
    return ["launcher=deepspeed", f"launcher.deepspeed.hostfile={hostfile}", f"launcher.deepspeed.ssh_port={SSH_PORT}"]


def own_environment(shown: Path) -> dict[str, str]:
    """DeepSpeed passes on what Python needs to find modules; what else there is goes through our file."""
    return {
        "PYTHONPATH": f"{ROOT / '.dev'}{os.pathsep}{HERE}",
        "WANDB_API_KEY": SECRET,
        "WANDB_SHOW": str(shown),
    }


@pytest.mark.launchers
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_what_would_run_can_be_pasted(
    launcher: str,
    hosts: list[Host],
    folder: Path,
    expected: list[float],
    reachable: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = ["launcher=torchrun", "launcher.num_procs=2"] if launcher == "torchrun" else over_ssh(hosts, folder)
    printing = [*("crossguard", "launch", "--dry-run"), *job(folder, f"{launcher}-pasted", *ours)]
    environment = reachable | own_environment(folder / f"{launcher}-environ.txt")
    text = subprocess.run(printing, cwd=HERE, env=environment, capture_output=True, text=True, check=True).stdout
    assert SECRET not in text
    (folder / "pasted.sh").write_text(f"set -e\n{text}")
    process = hosts[0].start(
        ["bash", str(folder / "pasted.sh")], said(folder, f"{launcher}-pasted", 0), cwd=HERE, env=environment
    )
    assert ended(folder, f"{launcher}-pasted", [process]) == [0], said(folder, f"{launcher}-pasted", 0).read_text()
    assert losses(folder, f"{launcher}-pasted") == expected
    assert f"KEY={SECRET}" in (folder / f"{launcher}-environ.txt").read_text()
    assert not list((folder / f"{launcher}-pasted").glob(".environment-*"))


def _command_lines() -> Iterator[str]:
    for process in psutil.process_iter(["cmdline"]):
        yield " ".join(process.info["cmdline"] or [])


@pytest.mark.launchers
def test_a_host_that_cannot_be_reached_is_named(hosts: list[Host], folder: Path, reachable: dict[str, str]) -> None:
    hostfile = folder / "unknown-hosts"
    hostfile.write_text(f"{hosts[0].address} slots=1\nunknown.invalid slots=1\n")
    ours = [*over_ssh(hosts, folder), f"launcher.deepspeed.hostfile={hostfile}"]
    line = ["crossguard", "train", *job(folder, "unknown", *ours)]
    text = said(folder, "unknown", 0)
    assert hosts[0].start(line, text, cwd=HERE, env=reachable).wait(60) == EXIT_USER_ERROR
    assert text.read_text().startswith(
        f"crossguard: {hostfile}: host 'unknown.invalid': ssh: Could not resolve hostname"
    )
    assert text.read_text().count("\n") == 1


@pytest.mark.launchers
def test_deepspeed_is_stopped_and_goes_on(
    hosts: list[Host], folder: Path, expected: list[float], reachable: dict[str, str]
) -> None:
    waiting = wait_in(folder / "deepspeed-waits", 1)
    process = deepspeed(hosts, folder, "stopped", reachable, waiting)
    text = said(folder, "stopped", 0)
    wait_for((folder / "deepspeed-waits" / "waiting-0").exists, text.read_text)
    psutil.Process(process.pid).send_signal(signal.SIGTERM)
    assert process.wait(60) == EXIT_PREEMPTED, text.read_text()
    stopped_at = step_of(latest_checkpoint(folder / "stopped"))  # type: ignore[arg-type]
    assert 0 < stopped_at < len(expected)
    assert not any("crossguard.train" in line and str(folder) in line for line in _command_lines())
    process = deepspeed(hosts, folder, "stopped", reachable, waiting)
    assert process.wait(120) == 0, text.read_text()
    assert f"going on after step {stopped_at}" in text.read_text()
    assert losses(folder, "stopped") == expected


@pytest.mark.launchers
def test_deepspeed_starts_again_what_died_on_one_host(
    hosts: list[Host], folder: Path, expected: list[float], reachable: dict[str, str]
) -> None:
    """The other rank, which cannot know, is ended as well."""
    waiting = wait_in(folder / "died-waits", 1)
    process = deepspeed(hosts, folder, "died", reachable, waiting, "launcher.max_restarts=1")
    text = said(folder, "died", 0)
    wait_for((folder / "died-waits" / "waiting-0").exists, text.read_text)
    there = subprocess.run(["ip", "netns", "pids", hosts[1].name], capture_output=True, text=True, check=True).stdout
    ranks = [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(process.pid) in there.split() and "-u -m crossguard.train" in " ".join(process.info["cmdline"] or [])
    ]
    assert ranks
    for rank in ranks:
        rank.kill()
    assert ended(folder, "died", [process]) == [0], text.read_text()
    assert "crossguard: a rank was ended by SIGKILL (is memory short?); restart 1 of 1\n" in text.read_text()
    assert losses(folder, "died") == expected


@pytest.mark.launchers
def test_torchrun_is_stopped_on_one_host_and_goes_on(hosts: list[Host], folder: Path, expected: list[float]) -> None:
    waiting = wait_in(folder / "torchrun-waits", 1)
    processes = torchrun(hosts, folder, "torchrun-stopped", waiting)
    text = said(folder, "torchrun-stopped", 0)
    wait_for((folder / "torchrun-waits" / "waiting-0").exists, text.read_text)
    processes[0].send_signal(signal.SIGTERM)
    assert ended(folder, "torchrun-stopped", processes) == [EXIT_PREEMPTED, EXIT_PREEMPTED], text.read_text()
    assert ended(folder, "torchrun-stopped", torchrun(hosts, folder, "torchrun-stopped", waiting)) == [0, 0]
    assert "train: going on after step" in text.read_text()
    assert losses(folder, "torchrun-stopped") == expected


@pytest.mark.launchers
def test_torchrun_goes_on_without_a_host_that_died(hosts: list[Host], folder: Path) -> None:
    elastic = ["launcher.torchrun.min_nodes=1", "launcher.max_restarts=3", "train.restart=true", "train.max_steps=60"]
    settings = [*elastic, "checkpoint.every_steps=10", "launcher.torchrun.rdzv_conf.last_call_timeout=2"]
    processes = torchrun(hosts, folder, "elastic", *settings)
    text, metrics = said(folder, "elastic", 0), folder / "elastic" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 20, text.read_text)
    # The second host dies: what was started there, and with it its agent and its rank, none of which says goodbye.
    there = psutil.Process(processes[1].pid).children(recursive=True)
    assert len(there) >= 2
    processes[1].kill()
    assert psutil.wait_procs(there, timeout=10)[1] == []
    wait_for(lambda: processes[0].poll() is not None, text.read_text, 140)
    assert processes[0].returncode == 0, text.read_text()
    assert "train: going on after step" in text.read_text()
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 61))


@pytest.mark.launchers
def test_torchrun_ends_where_the_host_of_the_endpoint_died(hosts: list[Host], folder: Path) -> None:
    waiting = wait_in(folder / "gone-waits", 1)
    processes = torchrun(hosts, folder, "gone", waiting, "launcher.max_restarts=3", "launcher.torchrun.min_nodes=1")
    wait_for((folder / "gone-waits" / "waiting-0").exists, said(folder, "gone", 0).read_text)
    processes[0].kill()  # and with it all that it has started
    assert ended(folder, "gone", processes)[1] == EXIT_FAILED
    lines = said(folder, "gone", 1).read_text().splitlines()
    assert "crossguard: the node of launcher.torchrun.endpoint is gone" in lines
    assert lines[-1].startswith(
        "crossguard: ranks lost contact with each other; see logs/ in the run directory; start again"
    )


@pytest.mark.launchers
def test_hosts_with_other_code_are_told_apart(
    hosts: list[Host], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "other" / "crossguard"
    for floor in ("configs", "data", "launchers", "recipes", "train"):
        shutil.copytree(ROOT / floor, copy / floor)
    with (copy / "train" / "loop.py").open("a") as source:
        source.write("# another version\n")
    processes = []
    for number, (host, package) in enumerate(zip(hosts, (ROOT / ".dev", copy.parent), strict=True)):
        line = ["crossguard", "train", *job(folder, "unequal", "launcher=torchrun", "launcher.nodes=2")]
        line += [f"launcher.torchrun.endpoint={hosts[0].address}:29400", f"launcher.torchrun.node_rank={number}"]
        environment = os.environ | {"PYTHONPATH": f"{package}{os.pathsep}{HERE}"}
        processes.append(host.start(line, said(folder, "unequal", number), cwd=HERE, env=environment))
    assert ended(folder, "unequal", processes) == [EXIT_USER_ERROR, EXIT_USER_ERROR]
    assert "the ranks run different code" in said(folder, "unequal", 0).read_text()

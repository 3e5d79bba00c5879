"""`crossguard launch` and its launchers, as far as nothing need run: what would run, and what is refused."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from launch_arguments import arguments, printed

from crossguard.configs.arguments import prepare
from crossguard.configs.errors import (
    UserError,
)
from crossguard.configs.schema import LauncherConfig
from crossguard.configs.schema.launcher import DeepspeedConfig
from crossguard.launchers import sbatch, world_sizes
from crossguard.launchers.hostfile import chosen, read_hostfile
from crossguard.recipes.launching import launch
from crossguard.recipes.sweeps import sweep

__all__ = ["arguments"]  # a fixture


def test_local_ranks_are_what_run_starts(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(printed(capsys, *arguments, "launcher.num_procs=2"))
    assert words[1:] == ["-m", "crossguard.recipes.cli", "run", *arguments, "launcher.num_procs=2"]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_what_would_run_are_the_stages_in_their_order(
    launcher: str, arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = ["launcher.num_procs=2", "launcher.deepspeed.export=[WANDB_API_*]", "description=a b"]
    lines = printed(capsys, *arguments, f"launcher={launcher}", *settings).splitlines()
    commands = [words for words in map(shlex.split, lines) if "recipe=tiny.yaml" in words]
    assert [next(word.removeprefix("stage=") for word in words if word in STAGES) for words in commands] == [
        "build",
        "train",
        "evaluate",
        "export",
    ]
    assert all("description=a b" in words for words in commands)
    if launcher == "deepspeed":  # What goes to the ranks through a file is there for as long as they need it.
        file = f"{tmp_path}/runs/My_job/.environment-printed.json"
        assert shlex.split(lines[1])[-3:] == [file, "WANDB_API_*", "OMP_NUM_THREADS"]
        assert all(f"environment={file}" in words for words in commands[1:3])
        assert lines[-1] == f"rm {file}"


STAGES = {"build", "export", "train", "evaluate", "stage=train", "stage=evaluate"}


def test_torchrun_s_own_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    elastic = [
        "launcher.nodes=4",
        "launcher.torchrun.min_nodes=2",
        "launcher.max_restarts=3",
        "launcher.num_procs=2",
        "train.batch_size=24",
    ]
    meeting = ["launcher.torchrun.endpoint=node0:29400", "launcher.torchrun.rdzv_conf={last_call_timeout: 5}"]
    train = printed(capsys, *arguments, "launcher=torchrun", *elastic, *meeting).splitlines()[1]
    for expected in (
        "--nnodes=2:4",
        "--max-restarts=3",
        "--nproc-per-node=2",
        "--rdzv-endpoint=node0:29400",
        "--rdzv-id=crossguard-train-My_job",
        "--shutdown-timeout=120",
        "last_call_timeout=5",
    ):
        assert expected in train
    fixed = ["launcher.nodes=2", "launcher.torchrun.node_rank=1", meeting[0]]
    which, train, evaluate = printed(capsys, *arguments, "launcher=torchrun", *fixed).splitlines()
    assert which.startswith("# For this node, any other than that of the endpoint, which builds and exports")
    assert "stage=evaluate" in evaluate
    assert "--nnodes=2 --rdzv-backend=static --node-rank=1 --master-addr=node0 --master-port=29400" in train


def script(text: str) -> str:
    """What sbatch is given, of what would run."""
    return text.partition("<<'SCRIPT'\n")[2].partition("SCRIPT\n")[0]


def test_the_sbatch_script(arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    settings = [
        *("launcher=slurm", "launcher.nodes=2", "launcher.gpus_per_node=4", "launcher.grace_seconds=30"),
        *("launcher.slurm.partition=gpu", "launcher.slurm.account=ours", "launcher.slurm.time=08:00:00"),
        *("launcher.slurm.modules=[cuda/12.8]", "launcher.environment.NCCL_DEBUG=a b", "launcher.slurm.qos=high"),
        *("launcher.slurm.options=['--mem=64G']", "description=it's"),
    ]
    text = printed(capsys, *arguments, *settings)
    directives = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {
        *("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--partition=gpu", "--account=ours", "--qos=high"),
        *("--time=08:00:00", "--signal=B:USR1@120", "--requeue", "--mem=64G", f"--chdir={tmp_path}"),
    } <= set(directives)
    assert "\nmodule load cuda/12.8 || exit 2\n" in text
    assert "\nexport NCCL_DEBUG='a b'\n" in text
    # A shell that runs it gives every word to crossguard as it was given here.
    echoed = script(text).replace(
        "-m crossguard.recipes.cli run", "-c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    )
    done = subprocess.run(
        ["bash"], input=echoed.replace("module load", ":"), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [*arguments, *prepare(settings).overrides]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("2:30", 150), ("1:00:00", 3600), ("1-2", 93600), ("1-2:30", 95400), ("0-0:0:5", 5), ("soon", None)],
)
def test_time_limits_are_read_as_sbatch_does(time: str, seconds: int | None) -> None:
    assert sbatch._seconds(time) == seconds


def test_a_sweep_s_scripts_can_be_pasted(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = ["--multirun", "launcher=slurm", "launcher.gpus_per_node=0", "train.lr=1e-3,1e-4"]
    text = printed(capsys, *arguments, *settings)
    program = tmp_path / "sbatch"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/called\ncat > {tmp_path}/script-$(wc -l < {tmp_path}/called)\necho 7\n'
    )
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash"], input=text, text=True, env=environment, timeout=20, check=True, stdout=subprocess.DEVNULL)
    after = "--parsable --dependency=afterok:7 --kill-on-invalid-dep=yes"
    assert (tmp_path / "called").read_text().splitlines() == ["--parsable", after]
    assert (tmp_path / "runs" / "My_job" / "launch").is_dir()  # where SLURM writes what the jobs print
    assert "-m crossguard.recipes.cli build " in (tmp_path / "script-1").read_text()
    array = (tmp_path / "script-2").read_text()
    assert "#SBATCH --array=0-1\n" in array
    assert array.count("train.lr-0.0001") == 1


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (1, False), (0, False)])
def test_the_script_has_itself_requeued_where_it_was_preempted(
    status: int, requeued: bool, arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With programs in the places of crossguard and scontrol; the real ones are tried in test_slurm.py."""
    text = printed(capsys, *arguments, "launcher=slurm", "launcher.gpus_per_node=0")
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\necho JobState=RUNNING\n')
    program.chmod(0o755)
    asked = f"trap 'exit {status}' USR1; kill -USR1 $PPID; while :; do sleep .1; done"
    lines = [
        f"bash -c {shlex.quote(asked)} &" if line.endswith('"$@" &') else line for line in script(text).splitlines()
    ]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-c", "\n".join(lines)], env=environment, timeout=20, check=False)
    assert done.returncode == status
    called = (tmp_path / "called").read_text() if (tmp_path / "called").exists() else ""
    assert ("requeue 7" in called) == requeued


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["launcher.nodes=2"], "launcher.nodes=2: launcher=local is this machine"),
        (["launcher=slrm"], "did you mean 'slurm'"),
        (["launcher=torchrun", "launcher.nodes=2"], "launcher.torchrun.endpoint: not set"),
        (["launcher=slurm"], "launcher.gpus_per_node: launcher=slurm needs it; 0 for none"),
        (
            ["launcher=slurm", "launcher.gpus_per_node=8", "launcher.num_procs=2"],
            "each rank takes one",
        ),
        (["launcher=slurm", "launcher.gpus_per_node=0", "launcher.slurm.time=00:04:00"], "ask the job to stop at once"),
        (["launcher=slurm", "launcher.gpus_per_node=3"], "3 ranks do not divide it"),
        (["launcher=kubernetes", "launcher.gpus_per_node=0"], "launcher.kubernetes.image: not set"),
        (
            ["launcher=kubernetes", "launcher.gpus_per_node=0", "launcher.kubernetes.image=x"],
            "on no volume of launcher.kubernetes.volumes (none is given)",
        ),
        (["launcher.environment.WANDB_API_KEY=x"], "WANDB_API_KEY looks like a secret"),
        (["launcher.slurm.options=['--export=ALL,HF_TOKEN=x']"], "HF_TOKEN looks like a secret"),
        (["launcher=deepspeed", "launcher.deepspeed.hostfile=nowhere"], "hostfile=nowhere: No such file"),
        (["--multirun"], "--multirun: no argument is a sweep"),
        (["--multirun", "train.lr=interval(0,1)"], "train.lr=interval(0,1): cannot be listed"),
        (["--dry-runn"], "did you mean '--dry-run'"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], settings: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        launch(["--dry-run", *arguments, *settings])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_without_the_scheduler_s_programs(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="sbatch: not found; submit from a machine of the cluster"):
        launch([*arguments, "launcher=slurm", "launcher.gpus_per_node=0"])
    record = Path("elsewhere") / "launch" / "submitted.json"
    with pytest.raises(UserError, match="was this job submitted"):
        launch(["status", "run_dir=elsewhere"])
    record.parent.mkdir(parents=True)
    for launcher, program in (("slurm", "squeue"), ("kubernetes", "kubectl")):
        record.write_text(json.dumps({"launcher": launcher, "jobs": ["7"], "namespace": None}))
        with pytest.raises(UserError, match=f"^{program}: not found"):
            launch(["status", "run_dir=elsewhere"])
    with pytest.raises(UserError, match="did you mean 'status'"):
        launch(["statsu", "run_dir=elsewhere"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a slots=2\nb 4\n", ":2: 'b 4': must be HOST slots=N"),
        ("a slots=2\n\nb slots=0\n", ":3: slots=0: must be a whole number from 1"),
        ("a slots=2x\n", ":1: slots=2x: must be a whole number"),
        ("a slots=2\n# a\na slots=1\n", ":3: host 'a' stands here twice"),
        ("# none\n", ": names no host"),
    ],
)
def test_a_wrong_hostfile_names_the_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "hostfile"
    file.write_text(content)
    with pytest.raises(UserError) as error:
        read_hostfile(file)
    assert str(error.value).startswith(f"{file}{message}")


def test_hosts_and_slots_are_chosen_as_deepspeed_does(tmp_path: Path) -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    file = tmp_path / "hostfile"
    file.write_text("a slots=4  # the first\n\nb slots=2\nc slots=1\n")
    hosts = read_hostfile(file)
    counts = {host: len(slots) for host, slots in hosts.items()}
    for include, exclude in [("b@a:1,3", None), ("c", None), (None, "a:0@b"), (None, None)]:
        theirs = dict(runner.parse_inclusion_exclusion(counts, include or "", exclude or ""))
        assert chosen(hosts, include, exclude, str(file)) == theirs
    for include, message in [("d", "host 'd' is not in"), ("b:2", "b has no slot '2'")]:
        with pytest.raises(UserError, match=message):
            chosen(hosts, include, None, str(file))
    config = LauncherConfig(name="deepspeed", deepspeed=DeepspeedConfig(hostfile=str(file), exclude="c"))
    assert world_sizes(config) == [6]


def test_a_sweep_has_a_run_directory_for_each_job(arguments: list[str]) -> None:
    jobs, base, build = sweep([*arguments[:2], "train.lr=1e-3,1e-4", "train.batch_size=choice(8,16)", "zero=2"])
    assert base == Path("runs/tiny-sweep")
    assert [job[-1] for job in jobs] == [
        f"run_dir=runs/tiny-sweep/train.lr-{lr}_train.batch_size-{size}"
        for lr in ("0.001", "0.0001")
        for size in (8, 16)
    ]
    assert all("data.shards=runs/tiny-sweep/shards" in job for job in [*jobs, build or []])
    # A sweep that decides the shards: each job builds its own.
    for decides in ("data.limit=10,20", "build.samples_per_shard=10,20", "data.options.a=1,2"):
        jobs, _, build = sweep([*arguments[:2], decides])
        assert len(jobs) == 2
        assert build is None
        assert not any(word.startswith("data.shards") for job in jobs for word in job)
    # A seed decides the posts of a generator alone.
    assert sweep([*arguments[:2], "seed=range(0,3)"])[2] is not None
    assert sweep(["recipe=quickstart", "seed=range(0,3)"])[2] is None

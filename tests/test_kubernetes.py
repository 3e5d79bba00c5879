"""Jobs for Kubernetes: the manifest against the published schema, and kubectl's part in the place of a cluster."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from launch_arguments import arguments, printed

from crossguard.configs.compose import compose
from crossguard.configs.errors import UserError
from crossguard.launchers.supervised import SECONDS_TO_END
from crossguard.recipes.launching import launch

__all__ = ["arguments"]  # a fixture


def test_the_manifest_fits_the_published_schema(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    folder = Path(arguments[-1].removeprefix("run_dir=")).parent.parent
    settings = [
        *("launcher=kubernetes", "launcher.nodes=2", "launcher.gpus_per_node=4", "launcher.kubernetes.image=us/it:1"),
        *(f"launcher.kubernetes.volumes={{{folder}: claim}}", "launcher.kubernetes.namespace=training"),
        *("launcher.kubernetes.secrets={WANDB_API_KEY: wandb/api-key}", "launcher.grace_seconds=200"),
        *("launcher.kubernetes.resources={memory: 64Gi, cpu: '32'}", "launcher.environment.NCCL_DEBUG=INFO"),
    ]
    job_set = yaml.safe_load(printed(capsys, *arguments, *settings))
    checked = models.JobsetV1alpha2JobSet.from_dict(job_set)
    assert checked.to_dict() == job_set  # The model drops what the schema does not know.
    jobs = job_set["spec"]["replicatedJobs"]
    assert [job["name"] for job in jobs] == ["build", "train", "evaluate", "export"]
    assert [job["template"]["spec"]["completions"] for job in jobs] == [1, 2, 2, 1]
    assert [job.get("dependsOn", [{}])[0].get("name") for job in jobs] == [None, "build", "train", "evaluate"]
    pod = jobs[1]["template"]["spec"]["template"]["spec"]
    # The launcher waits so long for its ranks, and once more for what has started them.
    assert pod["terminationGracePeriodSeconds"] > 200 + 2 * SECONDS_TO_END
    container = pod["containers"][0]
    assert container["resources"]["limits"] == {"memory": "64Gi", "cpu": "32", "nvidia.com/gpu": "4"}
    reference = {"secretKeyRef": {"name": "wandb", "key": "api-key"}}
    assert {"name": "WANDB_API_KEY", "valueFrom": reference} in container["env"]
    # The pods compose what they are told to.
    command = container["command"]
    assert command[:2] == ["crossguard", "train"]
    launcher = compose(command[2:]).launcher
    assert (launcher.name, launcher.nodes, launcher.num_procs) == ("torchrun", 2, 4)
    name = job_set["metadata"]["name"]
    assert launcher.torchrun.endpoint == f"{name}-train-0-0.{name}:29400"


def test_a_sweep_s_jobs_have_names_of_their_own(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = arguments[-1].removeprefix("run_dir=")
    settings = ["launcher=kubernetes", "launcher.gpus_per_node=0", "launcher.kubernetes.image=us/it:1"]
    sweep = ["--multirun", "train.lr=1e-3,1e-4", f"launcher.kubernetes.volumes={{{folder}: claim}}"]
    names = [job["metadata"]["name"] for job in yaml.safe_load_all(printed(capsys, *arguments, *settings, *sweep))]
    assert len(set(names)) == 2
    assert all(len(name) <= 36 for name in names)


def test_what_kubectl_is_told(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/told\ncase "$*" in *create*) cat > {tmp_path}/given ;; '
        f"*--output=name*) cat {tmp_path}/there ;; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    settings = [
        *("launcher=kubernetes", "launcher.gpus_per_node=0", "launcher.kubernetes.image=us/it:1"),
        *(f"launcher.kubernetes.volumes={{{tmp_path}: claim}}", "launcher.kubernetes.namespace=training"),
    ]
    manifest = printed(capsys, *arguments, *settings)
    (tmp_path / "there").write_text("jobset.jobset.x-k8s.io/mine\n")
    with pytest.raises(UserError, match="^mine: in the cluster already; `crossguard launch cancel` removes it"):
        launch([*arguments, *settings])
    (tmp_path / "there").write_text("")
    launch([*arguments, *settings])
    name = yaml.safe_load(manifest)["metadata"]["name"]
    assert (tmp_path / "given").read_text() == manifest == (tmp_path / "runs/My_job/launch/jobset.yaml").read_text()
    assert f"submitted as kubernetes {name}" in capsys.readouterr().out
    for question in ("status", "logs", "cancel"):
        launch([question, arguments[-1]])
    pods = f"--selector=jobset.sigs.k8s.io/jobset-name in ({name})"
    asked = f"--namespace=training get jobsets {name} --ignore-not-found --output=name"
    assert (tmp_path / "told").read_text().splitlines() == [
        asked,
        asked,
        "--namespace=training create --filename=-",
        f"--namespace=training get jobsets {name}",
        f"--namespace=training get pods {pods}",
        f"--namespace=training logs {pods} --prefix --tail=100",
        f"--namespace=training delete jobsets {name} --ignore-not-found",
    ]
    with pytest.raises(UserError, match="every pod that is started again would begin anew"):
        launch([*arguments, *settings, "train.restart=true"])

"""Jobs as Kubernetes gets them: a JobSet whose stages follow each other, those with ranks on all nodes.

A JobSet and not a Kubeflow PyTorchJob: the training operator that serves the latter is in maintenance, and its
successor, Kubeflow Trainer, builds on JobSet. Each pod starts torchrun's agent; the first pod of a stage is where they
meet. Status 75 (preempted) and evictions start a pod again without being counted; 2 ends the job at once.
"""

from __future__ import annotations

import math
import re
from pathlib import PurePosixPath
from typing import Any

import yaml

from crossguard.configs.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, UserError
from crossguard.configs.schema import LauncherConfig
from crossguard.launchers import procs_per_node
from crossguard.launchers.programs import need, output
from crossguard.launchers.work import Stage, Work

PORT = 29400
CONTAINER = "crossguard"
# Beyond `launcher.grace_seconds`, until the kubelet kills: the launcher ends its ranks, the tracker is closed.
SECONDS_OF_SLACK = 30
# Pulling an image takes longer on one node than on another.
SECONDS_TO_MEET = 1800
ELSEWHERE = "submit from a machine with kubectl, or print the manifest with --dry-run"


def manifest(works: list[Work], config: LauncherConfig) -> str:
    """The JobSets of jobs, as YAML documents.

    Raises:
        UserError: the run directory lies on no volume, so that it would be gone with the pods.
    """
    return yaml.safe_dump_all([job_set(work, config) for work in works], sort_keys=False, allow_unicode=True)


def job_set(work: Work, config: LauncherConfig) -> dict[str, Any]:
    """The JobSet of a job; raises as `manifest` does."""
    where = PurePosixPath(work.run_dir)
    if not any(where.is_relative_to(path) for path in config.kubernetes.volumes):
        mounted = ", ".join(config.kubernetes.volumes) or "none is given"
        raise UserError(f"run_dir={where}: on no volume of launcher.kubernetes.volumes ({mounted}); choose one there")
    jobs: list[dict[str, Any]] = []
    for stage in work.stages:
        job = _replicated_job(work, stage, config)
        if jobs:
            job["dependsOn"] = [{"name": jobs[-1]["name"], "status": "Complete"}]
        jobs.append(job)
    metadata = {"name": work.name} | ({"namespace": config.kubernetes.namespace} if config.kubernetes.namespace else {})
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": config.max_restarts},
            "successPolicy": {"operator": "All"},
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": jobs,
        },
    }


def _replicated_job(work: Work, stage: Stage, config: LauncherConfig) -> dict[str, Any]:
    nodes = config.nodes if stage.has_ranks else 1
    # With the job's name and two indices a pod's host name, of at most 63 characters.
    name = re.sub(r"[^a-z0-9-]+", "-", stage.name.lower())[:20].strip("-")
    preempted = {
        "action": "Ignore",
        "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [EXIT_PREEMPTED]},
    }
    evicted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    wrong = {
        "action": "FailJob",
        "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [EXIT_USER_ERROR]},
    }
    spec = {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [preempted, evicted, wrong]},
        "template": {"spec": _pod(work, stage, name, config)},
    }
    return {"name": name, "replicas": 1, "template": {"spec": spec}}


def _pod(work: Work, stage: Stage, name: str, config: LauncherConfig) -> dict[str, Any]:
    settings = config.kubernetes
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": math.ceil(config.grace_seconds) + SECONDS_OF_SLACK,
        "containers": [_container(work, stage, name, config)],
        "volumes": [
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}},
            *(
                {"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}}
                for number, claim in enumerate(settings.volumes.values())
            ),
        ],
    }
    if settings.node_selector:
        pod["nodeSelector"] = dict(settings.node_selector)
    return pod


def _container(work: Work, stage: Stage, name: str, config: LauncherConfig) -> dict[str, Any]:
    settings = config.kubernetes
    gpus = (config.gpus_per_node if config.gpus_per_node is not None else config.num_procs) or 0
    limits = {**settings.resources, **({settings.gpu_resource: str(gpus)} if gpus and stage.has_ranks else {})}
    environment: list[dict[str, Any]] = [{"name": key, "value": value} for key, value in config.environment.items()]
    for key, reference in settings.secrets.items():
        secret, _, entry = reference.partition("/")
        environment.append({"name": key, "valueFrom": {"secretKeyRef": {"name": secret, "key": entry}}})
    mounts = [{"name": f"volume-{number}", "mountPath": path} for number, path in enumerate(settings.volumes)]
    command = [
        "crossguard",
        stage.command,
        *stage.arguments,
        *(_meeting(work, name, config) if stage.has_ranks else []),
    ]
    return {
        "name": CONTAINER,
        "image": settings.image,
        "command": [_literally(word) for word in command],
        "env": environment,
        "resources": {"limits": limits},
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}, *mounts],
    }


def _meeting(work: Work, name: str, config: LauncherConfig) -> list[str]:
    """The last word over the launcher: in the pods it is torchrun's agent."""
    chosen = ["launcher.name=torchrun", f"launcher.num_procs={procs_per_node(config)}"]
    if config.nodes == 1:
        return chosen
    endpoint = f"{work.name}-{name}-0-0.{work.name}:{PORT}"
    return [
        *chosen,
        f"launcher.torchrun.endpoint={endpoint}",
        *(f"launcher.torchrun.rdzv_conf.{name}_timeout={SECONDS_TO_MEET}" for name in ("join", "read")),
    ]


def _literally(word: str) -> str:
    """Kubernetes puts variables in for $(NAME); $$ stands for $."""
    return word.replace("$(", "$$(")


def submit(names: list[str], text: str, config: LauncherConfig) -> None:
    """Hand the manifest of the JobSets that are called so to the cluster.

    Raises:
        UserError: kubectl is missing, one of them is there, running or done, or the cluster refuses the manifest.
    """
    need("kubectl", ELSEWHERE)
    kubectl = ["kubectl", *_namespace(config.kubernetes.namespace)]
    there = output([*kubectl, "get", "jobsets", *names, "--ignore-not-found", "--output=name"], wrong=UserError)
    if there:  # Applied again it would not begin again.
        found = ", ".join(line.rpartition("/")[2] for line in there.splitlines())
        raise UserError(
            f"{found}: in the cluster already; `crossguard launch cancel` removes it, and what it saved stays"
        )
    output([*kubectl, "create", "--filename=-"], text, wrong=UserError)


def status(names: list[str], namespace: str | None) -> str:
    """A line for each JobSet, and one for each pod of it."""
    need("kubectl", ELSEWHERE)
    get = ["kubectl", *_namespace(namespace), "get"]
    return "\n".join((output([*get, "jobsets", *names]), output([*get, "pods", f"--selector={_selector(names)}"])))


def logs(names: list[str], namespace: str | None) -> str:
    """The last lines that each pod printed."""
    need("kubectl", ELSEWHERE)
    return output(
        ["kubectl", *_namespace(namespace), "logs", f"--selector={_selector(names)}", "--prefix", "--tail=100"]
    )


def cancel(names: list[str], namespace: str | None) -> None:
    """Remove the JobSets; what the job has saved stays."""
    need("kubectl", ELSEWHERE)
    output(["kubectl", *_namespace(namespace), "delete", "jobsets", *names, "--ignore-not-found"])


def _namespace(namespace: str | None) -> list[str]:
    return [f"--namespace={namespace}"] if namespace else []


def _selector(names: list[str]) -> str:
    return f"jobset.sigs.k8s.io/jobset-name in ({','.join(names)})"

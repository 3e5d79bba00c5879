"""Where the ranks run."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from crossguard.configs.errors import UserError
from crossguard.configs.schema.checks import at_least, one_of

LAUNCHERS = ("local", "torchrun", "deepspeed", "slurm", "kubernetes")

# Environment variables whose names say that they hold a secret.
SECRET_NAME = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)($|_)", re.IGNORECASE)
VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass
class TorchrunConfig:
    """torchrun's agent: the same command is started on every node, by hand or by what watches the machines."""

    # Where the nodes meet, HOST:PORT on one of them; several nodes need it.
    endpoint: str | None = None
    # Names the job at the endpoint, the same on all nodes.
    id: str = "crossguard"
    # The number of this node from 0, where it is to be fixed; node 0 is then the endpoint's. By default the nodes
    # agree on their numbers.
    node_rank: int | None = None
    # Start with, and go on with, as few nodes as this; by default all `launcher.nodes` are needed.
    min_nodes: int | None = None
    # The address of this node, where its host name leads the others elsewhere.
    local_addr: str | None = None
    # torchrun's --rdzv-conf, e.g. {join_timeout: 900, last_call_timeout: 30} in seconds.
    rdzv_conf: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least("launcher.torchrun.node_rank", self.node_rank, 0)
        at_least("launcher.torchrun.min_nodes", self.min_nodes, 1)
        if self.node_rank is not None and self.min_nodes is not None:
            raise UserError("launcher.torchrun.min_nodes: nodes that may come and go have no fixed node_rank; give one")
        if self.endpoint is not None and not re.fullmatch(r"\S+:\d+", self.endpoint):
            raise UserError(f"launcher.torchrun.endpoint={self.endpoint}: must be HOST:PORT")


@dataclass
class DeepspeedConfig:
    """DeepSpeed's launcher: one command starts the ranks of all hosts, over ssh (pdsh)."""

    # A file with a line `HOST slots=N` for each host; without one the ranks run on this machine.
    hostfile: str | None = None
    # Hosts and slots to use, e.g. worker-0@worker-1:0,2; by default all of the hostfile.
    include: str | None = None
    # Hosts and slots not to use.
    exclude: str | None = None
    # The address of the first host, where `hostname -I` there does not begin with the one to use.
    master_addr: str | None = None
    # The port on the first host where the ranks meet.
    master_port: int = 29500
    # The port of ssh; by default what ssh takes.
    ssh_port: int | None = None
    # Environment variables that the ranks get from here, a * at the end for all that begin so. They go through a file
    # that only the user may read, never over a command line.
    export: list[str] = field(
        default_factory=lambda: ["OMP_*", "DS_*", "NCCL_*", "GLOO_*", "CUDA_*", "WANDB_*", "HF_*", "AWS_*"]
    )

    def __post_init__(self) -> None:
        at_least("launcher.deepspeed.master_port", self.master_port, 1)
        at_least("launcher.deepspeed.ssh_port", self.ssh_port, 1)
        if self.include and self.exclude:
            raise UserError("launcher.deepspeed.include, exclude: one excludes the other; give one of them")


@dataclass
class SlurmConfig:
    """A SLURM job that runs all stages, submits itself again when it is preempted, and goes on."""

    # Partition; by default the cluster's.
    partition: str | None = None
    # Account to charge.
    account: str | None = None
    # Quality of service.
    qos: str | None = None
    # Time limit, e.g. 08:00:00 or 2-00:00:00; by default the partition's. Before it ends the job saves and is requeued.
    time: str | None = None
    # CPUs of each rank.
    cpus_per_task: int | None = None
    # Container image for the ranks, crossguard installed in it (needs the pyxis plugin); build and export run outside.
    container: str | None = None
    # SOURCE:TARGET folders that the container sees, beside the working directory and the run directory.
    container_mounts: list[str] = field(default_factory=list)
    # Modules to load before anything runs.
    modules: list[str] = field(default_factory=list)
    # Further options of sbatch, e.g. ["--mem=64G", "--constraint=h100"].
    options: list[str] = field(default_factory=list)
    # Of the jobs of a sweep, how many may run at a time; by default all.
    array_parallelism: int | None = None

    def __post_init__(self) -> None:
        at_least("launcher.slurm.cpus_per_task", self.cpus_per_task, 1)
        at_least("launcher.slurm.array_parallelism", self.array_parallelism, 1)
        for option in self.options:
            if not option.startswith("-") or "\n" in option:
                raise UserError(f"launcher.slurm.options: '{option}' is no option of sbatch, such as --mem=64G")
            if secret := next(filter(SECRET_NAME.search, re.findall(r"(\w+)=", option)), None):
                raise UserError(
                    f"launcher.slurm.options: {secret} looks like a secret, which would stand on command lines and in "
                    "files; set it in the environment of this command, from which SLURM takes it"
                )


@dataclass
class KubernetesConfig:
    """A JobSet: the stages one after the other, those with ranks on all nodes."""

    # The container image; crossguard is installed in it.
    image: str | None = None
    # Namespace; by default that of kubectl's context.
    namespace: str | None = None
    # Mount path -> name of the PersistentVolumeClaim; `run_dir` and the posts lie on one of them.
    volumes: dict[str, str] = field(default_factory=dict)
    # Environment variable -> SECRET/KEY, e.g. {WANDB_API_KEY: wandb/api-key}; only the reference is in the manifest.
    secrets: dict[str, str] = field(default_factory=dict)
    # CPUs and memory of each node, e.g. {cpu: "8", memory: 64Gi}.
    resources: dict[str, str] = field(default_factory=dict)
    # Labels that a node must have.
    node_selector: dict[str, str] = field(default_factory=dict)
    # The resource by which the cluster counts its GPUs.
    gpu_resource: str = "nvidia.com/gpu"
    # Size of /dev/shm, through which ranks and workers of a node hand over data.
    shared_memory: str = "8Gi"

    def __post_init__(self) -> None:
        for name, reference in self.secrets.items():
            if not VARIABLE_NAME.fullmatch(name) or not re.fullmatch(r"[^/\s]+/[^/\s]+", reference):
                raise UserError(f"launcher.kubernetes.secrets: {name}: must be NAME: SECRET/KEY")
        for path in self.volumes:
            if not path.startswith("/"):
                raise UserError(f"launcher.kubernetes.volumes: '{path}': mount paths begin with /")


@dataclass
class LauncherConfig:
    """How many ranks, on what."""

    # The launcher that starts the ranks.
    name: str = "local"
    # Machines that train together.
    nodes: int = 1
    # Ranks on each node; by default one for each GPU, or one. Under deepspeed the hostfile says it.
    num_procs: int | None = None
    # GPUs of each node that slurm or kubernetes is asked for, 0 for none; by default one for each rank of `num_procs`.
    gpus_per_node: int | None = None
    # Threads of each rank; by default the machine's cores shared out between the ranks.
    threads_per_proc: int | None = None
    # Seconds that the ranks have to save and end after SIGTERM or SIGUSR1, before they are killed.
    grace_seconds: float = 120.0
    # How often the ranks are started again, from the newest checkpoint, after one was killed by a signal or hung.
    max_restarts: int = 0
    # From the second restart on, local: use fewer ranks each time; in training the next smaller number that divides
    # train.batch_size.
    elastic: bool = False
    # Environment variables for the job, e.g. {NCCL_DEBUG: INFO}. No secrets: they would stand in files.
    environment: dict[str, str] = field(default_factory=dict)
    # launcher=torchrun.
    torchrun: TorchrunConfig = field(default_factory=TorchrunConfig)
    # launcher=deepspeed.
    deepspeed: DeepspeedConfig = field(default_factory=DeepspeedConfig)
    # launcher=slurm.
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    # launcher=kubernetes.
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)

    def __post_init__(self) -> None:
        one_of("launcher.name", self.name, LAUNCHERS)
        at_least("launcher.nodes", self.nodes, 1)
        at_least("launcher.num_procs", self.num_procs, 1)
        at_least("launcher.gpus_per_node", self.gpus_per_node, 0)
        at_least("launcher.threads_per_proc", self.threads_per_proc, 1)
        at_least("launcher.grace_seconds", self.grace_seconds, 0)
        at_least("launcher.max_restarts", self.max_restarts, 0)
        for name in self.environment:
            if not VARIABLE_NAME.fullmatch(name):
                raise UserError(f"launcher.environment: '{name}' is no name of an environment variable")
            if SECRET_NAME.search(name):
                raise UserError(
                    f"launcher.environment: {name} looks like a secret, which must not stand in a configuration; set "
                    f"it in the environment of this command (kubernetes: launcher.kubernetes.secrets)"
                )
        self._check_name()

    def _check_name(self) -> None:
        if self.name == "local" and self.nodes > 1:
            raise UserError(
                f"launcher.nodes={self.nodes}: launcher=local is this machine; take torchrun, deepspeed, slurm or"
                " kubernetes"
            )
        if self.name == "torchrun" and self.nodes > 1 and not self.torchrun.endpoint:
            raise UserError("launcher.torchrun.endpoint: not set; say HOST:PORT where the nodes meet")
        if self.name == "torchrun" and (self.torchrun.min_nodes or 1) > self.nodes:
            raise UserError(f"launcher.torchrun.min_nodes: above launcher.nodes={self.nodes}")
        if self.name == "deepspeed" and self.nodes > 1:
            raise UserError("launcher.nodes: under launcher=deepspeed the hostfile says how many hosts there are")
        if self.name in ("slurm", "kubernetes"):
            self._check_gpus()
        if self.name == "kubernetes" and not self.kubernetes.image:
            raise UserError("launcher.kubernetes.image: not set; name an image with crossguard in it")

    def _check_gpus(self) -> None:
        if self.num_procs is None and self.gpus_per_node is None:
            raise UserError(f"launcher.gpus_per_node: launcher={self.name} needs it; 0 for none")
        if self.gpus_per_node and self.num_procs and self.gpus_per_node != self.num_procs:
            raise UserError(
                f"launcher.gpus_per_node={self.gpus_per_node}: each rank takes one, and launcher.num_procs, perhaps the"
                f" recipe's, is {self.num_procs}; make them equal"
            )

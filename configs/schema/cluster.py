"""The machines that a job is planned for: how many, and what their GPUs can do."""

from __future__ import annotations

from dataclasses import dataclass, field

from crossguard.configs.errors import UserError
from crossguard.configs.schema.checks import above, at_least

# Ranks that run on the cores of a machine, without GPUs.
CPU = "cpu"


@dataclass
class ClusterConfig:
    """What `crossguard plan` plans for; `cluster=NAME` chooses the kind of GPU, and `cluster.gpu=NAME` says the same.

    Training looks at all files for the peaks of the GPU that it runs on.
    """

    # The kind of GPU: the name of a file in configs/cluster/, of the package or of the working directory.
    gpu: str = CPU
    # Machines.
    nodes: int = 1
    # GPUs, and so ranks, of a machine; by default launcher.num_procs, or one.
    gpus_per_node: int | None = None
    # Memory of a GPU in GiB; by default (on CPU) a rank's share of this machine's memory.
    memory_gib: float | None = None
    # Of it, what the driver, NCCL and the allocator's gaps take, in GiB.
    reserved_gib: float = 0.0
    # Peak of fp32 matrix products, in 1e12 operations a second.
    fp32_tflops: float = 0.0
    # Peak of bf16 matrix products without sparsity, in 1e12 operations a second.
    bf16_tflops: float = 0.0
    # Bandwidth of a GPU's memory, in 1e9 bytes a second.
    memory_gb_per_s: float = 0.0
    # What a GPU sends to the others of its machine, in 1e9 bytes a second and one direction.
    intra_node_gb_per_s: float = 0.0
    # A GPU's share of what its machine sends to others, in 1e9 bytes a second and one direction.
    inter_node_gb_per_s: float = 0.0
    # What torch.cuda.get_device_name() says of those with these peaks: training logs `mfu` on them.
    device_names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        at_least("cluster.nodes", self.nodes, 1)
        at_least("cluster.gpus_per_node", self.gpus_per_node, 1)
        at_least("cluster.reserved_gib", self.reserved_gib, 0)
        above("cluster.memory_gib", self.memory_gib, self.reserved_gib)
        if self.gpu != CPU and self.memory_gib is None:
            raise UserError(
                f"cluster.memory_gib: not set for cluster.gpu={self.gpu}; its file must say it, and a recipe names the "
                f"file in its defaults (override /cluster: {self.gpu})"
            )
        for name in (
            "fp32_tflops",
            "bf16_tflops",
            "memory_gb_per_s",
            "intra_node_gb_per_s",
            "inter_node_gb_per_s",
        ):
            if self.gpu != CPU:  # whose file has them
                above(f"cluster.{name}", getattr(self, name), 0)

    @property
    def is_gpu(self) -> bool:
        """Whether ranks run on GPUs."""
        return self.gpu != CPU

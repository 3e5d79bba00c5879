"""A bound of a step's time (the roofline model, Williams et al. 2009), and what a rank sends to the others for it."""

from __future__ import annotations

from dataclasses import dataclass

from crossguard.configs.schema.cluster import ClusterConfig
from crossguard.train.planning.memory import BF16, FP32, Case, Sizes
from crossguard.train.planning.trace import Trace

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class StepTime:
    """Seconds that the parts of a step take where each is as fast as the hardware can be; they do not overlap."""

    compute: float
    communication: float
    update: float

    @property
    def total(self) -> float:
        """Of a step: no step is faster."""
        return self.compute + self.communication + self.update


def communication_bytes(case: Case, sizes: Sizes) -> float:
    """What a rank sends in a step, in ring collectives: a reduce-scatter or an all-gather of S bytes sends
    S·(ranks - 1)/ranks, an all-reduce twice that.

    Stages 0 and 1 reduce gradients once a step, stages 2 and 3 in each pass. Stages 1 and 2 all-reduce whole buckets
    (use_multi_rank_bucket_allreduce) and gather the updated weights; stage 3 gathers them for each forward and each
    backward pass.
    """
    share = (case.ranks - 1) / case.ranks
    gradients = FP32 * sizes.trainable
    if case.bf16 and case.stage > 0:
        gradients = BF16 * sizes.bf16 + FP32 * (sizes.trainable - sizes.bf16)
    weights = FP32 * sizes.parameters
    if case.stage == 0:
        return share * 2 * gradients
    if case.stage < 3:
        passes = 1 if case.stage == 1 else case.accumulation
        return share * (2 * gradients * passes + FP32 * sizes.trainable)
    if case.bf16:
        weights -= (FP32 - BF16) * sizes.bf16
    return share * case.accumulation * (2 * weights + gradients)


def step_time(case: Case, sizes: Sizes, trace: Trace, cluster: ClusterConfig) -> StepTime:
    """The bound of a step of `case.accumulation` passes like `trace`."""
    peak = (cluster.bf16_tflops if case.bf16 else cluster.fp32_tflops) * TERA
    memory = cluster.memory_gb_per_s * GIGA
    one_pass = sum(max(operation.flops / peak, operation.bytes / memory) for operation in trace.operations)
    # AdamW reads weight, gradient and both moments, and writes all but the gradient.
    updated = sizes.trainable if case.stage == 0 else sizes.trainable / case.ranks
    return StepTime(
        compute=case.accumulation * one_pass,
        communication=communication_bytes(case, sizes) / _bandwidth(cluster),
        update=7 * FP32 * updated / memory,
    )


def _bandwidth(cluster: ClusterConfig) -> float:
    """Bytes a second that a rank sends in a collective: rings cross from machine to machine through every adapter of a
    machine, each carrying its share."""
    if cluster.nodes == 1:
        return cluster.intra_node_gb_per_s * GIGA
    between = cluster.inter_node_gb_per_s * (cluster.gpus_per_node or 1)
    return GIGA * (between if cluster.gpus_per_node == 1 else min(cluster.intra_node_gb_per_s, between))

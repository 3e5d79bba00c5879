"""The plan of a job: every way to train it on a cluster, which of them fit, and the one to take."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil

from crossguard.configs.schema import Config
from crossguard.configs.schema.cluster import ClusterConfig
from crossguard.data.loading.order import micro_batches
from crossguard.train.planning.memory import Case, Memory, Sizes, ZeroSettings, memory_of, model_states
from crossguard.train.planning.roofline import StepTime, communication_bytes, step_time
from crossguard.train.planning.shapes import Shapes
from crossguard.train.planning.trace import Trace, at_batch

GIB = 1 << 30
# Stage and what is offloaded, from the one to prefer to the last resort: whatever is offloaded travels in every step.
WAYS = (
    *((stage, "none") for stage in range(4)),
    *((stage, "optimizer") for stage in (1, 2, 3)),
    (3, "optimizer+parameters"),
)


@dataclass(frozen=True)
class Way:
    """One way to train."""

    case: Case
    micro_batch_size: int
    memory: Memory
    fits: bool
    # Posts in the largest forward pass that fits; 0 when not even one does.
    largest_micro_batch_size: int
    communication: float
    time: StepTime


@dataclass(frozen=True)
class Plan:
    """All of it."""

    cluster: ClusterConfig
    sizes: Sizes
    # Bytes of a device that a job may use.
    available: float
    # Posts in a step over all ranks.
    batch_size: int
    # Floating-point operations of a step over all ranks.
    flops: float
    ways: list[Way]
    recommended: Way | None

    def as_json(self) -> dict[str, Any]:
        """Nested dictionaries of numbers and names; memory and communication in bytes, time in seconds."""
        return {
            "cluster": asdict(self.cluster),
            "parameters": {
                "total": self.sizes.parameters,
                "trainable": self.sizes.trainable,
                "frozen": self.sizes.parameters - self.sizes.trainable,
            },
            "batch_size": self.batch_size,
            "flops_per_step": self.flops,
            "available_bytes": self.available,
            "ways": [_as_json(way, self.sizes) for way in self.ways],
            "recommended": None if self.recommended is None else _choice(self.recommended),
        }


def make_plan(config: Config) -> Plan:
    """Plan a job, without a GPU, shards or weights.

    Raises:
        UserError: the model cannot be built, or the ranks do not divide the batch.
    """
    cluster = replace(config.cluster, gpus_per_node=config.cluster.gpus_per_node or config.launcher.num_procs or 1)
    ranks = cluster.nodes * (cluster.gpus_per_node or 1)
    micro_batch, _ = micro_batches(config.train.batch_size, ranks, config.train.micro_batch_size)
    shapes = Shapes(config)
    settings = ZeroSettings.of(config.zero.deepspeed)
    sizes = Sizes.of(shapes.model, settings)
    # One post alone would be treated apart: an axis of length one is spread without memory.
    posts = max(2, micro_batch)
    small, large = shapes.trace(posts), shapes.trace(2 * posts)
    planner = _Planner(config, cluster, ranks, sizes, settings, small, large)
    ways = [planner.way(stage, offload, micro_batch) for stage, offload in WAYS if offload == "none" or cluster.is_gpu]
    recommended = recommend(ways)
    if recommended is not None:
        case = recommended.case
        share = config.train.batch_size // ranks
        best, _ = micro_batches(share, 1, recommended.largest_micro_batch_size)
        recommended = planner.way(case.stage, case.offload, best)
    flops = config.train.batch_size * small.flops / small.posts
    return Plan(cluster, sizes, planner.available, config.train.batch_size, flops, ways, recommended)


def recommend(ways: list[Way]) -> Way | None:
    """The first way that fits; where none does at the recipe's micro-batch, the one with room for the most posts."""
    fitting = [way for way in ways if way.fits]
    if fitting:
        return fitting[0]
    most = max(ways, key=lambda way: way.largest_micro_batch_size)
    return most if most.largest_micro_batch_size else None


class _Planner:
    """What all ways have in common."""

    def __init__(
        self,
        config: Config,
        cluster: ClusterConfig,
        ranks: int,
        sizes: Sizes,
        settings: ZeroSettings,
        small: Trace,
        large: Trace,
    ):
        self.config, self.cluster, self.ranks = config, cluster, ranks
        self.sizes, self.settings, self.small, self.large = sizes, settings, small, large
        memory_gib = cluster.memory_gib or psutil.virtual_memory().total / GIB / (cluster.gpus_per_node or 1)
        self.available = (memory_gib - cluster.reserved_gib) * GIB

    def way(self, stage: int, offload: str, micro_batch_size: int) -> Way:
        """A stage at a micro-batch."""
        case, trace = self._case(stage, offload, micro_batch_size), self._trace(micro_batch_size)
        memory = memory_of(case, self.sizes, self.settings, trace)
        return Way(
            case,
            micro_batch_size,
            memory,
            fits=memory.total <= self.available,
            largest_micro_batch_size=self._largest(stage, offload),
            communication=communication_bytes(case, self.sizes),
            time=step_time(case, self.sizes, trace, self.cluster),
        )

    def _largest(self, stage: int, offload: str) -> int:
        """Posts in the largest pass that fits, found by halving; no more than a rank has in a step."""
        low, high = 0, self.config.train.batch_size // self.ranks
        while low < high:
            middle = (low + high + 1) // 2
            case, trace = self._case(stage, offload, middle), self._trace(middle)
            if memory_of(case, self.sizes, self.settings, trace).total <= self.available:
                low = middle
            else:
                high = middle - 1
        return low

    def _case(self, stage: int, offload: str, micro_batch_size: int) -> Case:
        accumulation = -(-self.config.train.batch_size // (self.ranks * micro_batch_size))
        bf16 = self.config.train.precision == "bf16"
        return Case(
            stage,
            offload,
            self.ranks,
            accumulation,
            bf16,
            on_cpu=not self.cluster.is_gpu,
            averaged=self.config.train.ema_decay > 0,
            in_parts=stage == 3 and self.config.model.has_pretrained,
        )

    def _trace(self, posts: int) -> Trace:
        return at_batch(self.small, self.large, posts)


def _choice(way: Way) -> dict[str, Any]:
    return {"zero": way.case.stage, "offload": way.case.offload, "micro_batch_size": way.micro_batch_size} | {
        "memory_bytes": way.memory.total,
        "step_seconds": way.time.total,
    }


def _as_json(way: Way, sizes: Sizes) -> dict[str, Any]:
    memory = asdict(way.memory) | {"total": way.memory.total}
    host, states = memory.pop("host"), model_states(way.case, sizes)
    return {
        "zero": way.case.stage,
        "offload": way.case.offload,
        "micro_batch_size": way.micro_batch_size,
        "accumulation": way.case.accumulation,
        "memory_bytes": memory,
        "model_states_bytes": states,
        "host_bytes": host,
        "fits": way.fits,
        "largest_micro_batch_size": way.largest_micro_batch_size,
        "communication_bytes": way.communication,
        "step_seconds": asdict(way.time) | {"total": way.time.total},
    }

"""Memory of a rank under each ZeRO stage (arXiv 1910.02054): what crossguard's engine and DeepSpeed 0.19 allocate.

Weights, gradients and both moments of AdamW are fp32 in every stage (see train/engine.py). So DeepSpeed's estimators
(`estimate_zero2_model_states_mem_needs`, `estimate_zero3_…`), which assume 16-bit weights and gradients beside fp32
masters, give the same 20 bytes a parameter on one rank and share them out in other portions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from crossguard.train.planning.trace import HEAP_BLOCK, Trace

FP32, BF16 = 4, 2
# What DeepSpeed sends as bf16 under autocast: LOWER_PRECISION_SAFE_MODULES in deepspeed/runtime/torch_autocast.py.
_SENT_AS_BF16 = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Elements that stage 0 reduces at a time: the default of DeepSpeedEngine.buffered_allreduce_fallback.
_STAGE_0_BUCKET = 500_000_000


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements."""

    parameters: int
    trainable: int
    # Of the trainable ones, those that are sent as bf16 under autocast.
    bf16: int
    # Of the trainable ones, the largest parameter.
    largest: int
    # Parameters, and trainable ones, that lie in the heap on CPU.
    heap_parameters: int
    heap_trainable: int
    # Parameters that stage 3 does not partition.
    persistent: int

    @classmethod
    def of(cls, model: nn.Module, settings: ZeroSettings) -> Sizes:
        """Counts those of a model, shared parameters once."""
        every = [parameter.numel() for parameter in model.parameters()]
        trainable = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
        sent = {
            id(parameter): parameter.numel() * parameter.requires_grad
            for module in model.modules()
            if type(module) in _SENT_AS_BF16
            for parameter in module.parameters(recurse=False)
        }
        return cls(
            parameters=sum(every),
            trainable=sum(trainable),
            bf16=sum(sent.values()),
            largest=max(trainable),
            heap_parameters=sum(size for size in every if size * FP32 < HEAP_BLOCK),
            heap_trainable=sum(size for size in trainable if size * FP32 < HEAP_BLOCK),
            persistent=sum(size for size in every if size < settings.persistence_threshold),
        )


@dataclass(frozen=True)
class ZeroSettings:
    """Those of DeepSpeed's settings that decide memory; numbers of elements."""

    reduce_bucket: int = 500_000_000
    allgather_bucket: int = 500_000_000
    overlap_comm: bool = False
    max_live: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    prefetch: int = 50_000_000
    persistence_threshold: int = 100_000

    @classmethod
    def of(cls, deepspeed: Mapping[str, Any]) -> ZeroSettings:
        """Reads `zero.deepspeed`; what is not set there has DeepSpeed's default."""
        given = deepspeed.get("zero_optimization") or {}

        def number(name: str, default: int) -> int:
            value = given.get(name, given.get(f"stage3_{name}", default))
            return default if value == "auto" else int(float(value))

        return cls(
            reduce_bucket=number("reduce_bucket_size", cls.reduce_bucket),
            allgather_bucket=number("allgather_bucket_size", cls.allgather_bucket),
            overlap_comm=bool(given.get("overlap_comm", False)),
            max_live=number("max_live_parameters", cls.max_live),
            max_reuse_distance=number("max_reuse_distance", cls.max_reuse_distance),
            prefetch=number("prefetch_bucket_size", cls.prefetch),
            persistence_threshold=number("param_persistence_threshold", cls.persistence_threshold),
        )


@dataclass(frozen=True)
class Term:
    """Bytes, and how many of them are blocks that lie in the heap on CPU."""

    bytes: float
    heap: float = 0.0


Phase = dict[str, Term]


@dataclass(frozen=True)
class Memory:
    """What a rank needs at its worst moment, in bytes."""

    weights: float
    optimizer: float
    gradients: float
    buffers: float
    activations: float
    # On CPU: what the heap once held and keeps, beside what it holds at that moment.
    kept: float
    # In the host's memory, for what is offloaded.
    host: float
    # When that is: "start", "backward", "reduce" or "update".
    phase: str

    @property
    def total(self) -> float:
        """On the device."""
        return self.weights + self.optimizer + self.gradients + self.buffers + self.activations + self.kept


@dataclass(frozen=True)
class Case:
    """One way to train: a stage, what is offloaded, and how many ranks share the states."""

    stage: int
    # "none", "optimizer", or "optimizer+parameters" (stage 3).
    offload: str
    ranks: int
    # Forward passes in a step.
    accumulation: int
    bf16: bool
    on_cpu: bool

    @property
    def offloads(self) -> bool:
        """Whether the optimizer's states lie in the host's memory."""
        return self.offload != "none"


def memory_of(case: Case, sizes: Sizes, settings: ZeroSettings, trace: Trace) -> Memory:
    """The worst moment of a rank.

    On CPU, pages of a buffer that nothing was written to take no memory, and a freed block of the heap stays with the
    process (glibc returns only its end): the heap counts with the most that it held at any moment.
    """
    phases = (_stage_0, _stages_1_and_2, _stages_1_and_2, _stage_3)[case.stage](case, sizes, settings, trace)
    heap = {name: sum(term.heap for term in phase.values()) for name, phase in phases.items()}
    most = max(heap.values()) if case.on_cpu else 0.0

    def total(name: str) -> float:
        live = sum(term.bytes for term in phases[name].values())
        return live - heap[name] + most if case.on_cpu else live

    worst = max(phases, key=total)
    terms = {name: phases[worst].get(name, Term(0.0)).bytes for name in ("weights", "optimizer", "gradients")}
    terms |= {name: phases[worst].get(name, Term(0.0)).bytes for name in ("buffers", "activations")}
    kept = most - heap[worst] if case.on_cpu else 0.0
    return Memory(**terms, kept=kept, host=_host(case, sizes), phase=worst)


def _stage_0(case: Case, sizes: Sizes, settings: ZeroSettings, trace: Trace) -> dict[str, Phase]:
    """Everything on every rank; gradients are reduced in flat copies (engine.allreduce_bucket)."""
    weights = Term(FP32 * sizes.parameters, FP32 * sizes.heap_parameters)
    optimizer = Term(2 * FP32 * sizes.trainable, 2 * FP32 * sizes.heap_trainable)
    gradients = _whole_gradients(sizes)
    copy = Term(FP32 * min(sizes.trainable, _STAGE_0_BUCKET))
    return {
        "start": {"weights": weights, **_check(case, sizes)},
        "backward": {"weights": weights, "optimizer": optimizer, **_backward(case, sizes, trace)},
        "reduce": {"weights": weights, "optimizer": optimizer, "gradients": gradients, "buffers": copy},
    }


def _stages_1_and_2(case: Case, sizes: Sizes, settings: ZeroSettings, trace: Trace) -> dict[str, Phase]:
    """Weights in flat buffers on every rank; a rank's partition of them once more, and its moments."""
    weights, part = Term(FP32 * sizes.parameters), FP32 * sizes.trainable / case.ranks
    optimizer = Term(0.0 if case.offloads else 3 * part)
    bucket = min(sizes.trainable, settings.reduce_bucket)
    buckets = _buckets_1_and_2(case, sizes, settings)
    # average_tensor flattens the slices of a bucket once more, and under bf16 that to bf16 (allreduce_bucket).
    copies = FP32 * bucket if not case.bf16 else (FP32 + BF16) * min(sizes.bf16, bucket)
    # What is accumulated of the partition (grads_in_partition); the bound of a large model's buckets is reached while
    # activations are still there.
    held = part if case.accumulation > 1 and case.stage == 2 and not case.offloads else 0.0
    beyond = Term(FP32 * (sizes.trainable - bucket) + held) if case.stage == 1 else Term(held)
    during = Term(trace.activations, trace.heap) if case.stage == 2 and sizes.trainable > bucket else Term(0.0)
    backward = _backward(case, sizes, trace) if case.stage == 1 else _only_activations(trace)
    if case.stage == 2:
        backward["gradients"] = Term(held)
    backward_buffers = buckets if case.stage == 2 or not case.on_cpu else 0.0
    # The gradient of the partition and its flat copy (step), or the copy that all_gather makes of its list of shards.
    update = max(0.0 if case.offloads else 2 * part, FP32 * min(sizes.trainable, settings.allgather_bucket))
    same = {"weights": weights, "optimizer": optimizer}
    staging = FP32 * sizes.largest if case.offloads else 0.0
    return {
        "start": {"weights": Term(2 * FP32 * sizes.trainable + FP32 * (sizes.parameters - sizes.trainable)), **_check(case, sizes)},
        "backward": {**same, **backward, "buffers": Term(backward_buffers + staging)},
        "reduce": {**same, "gradients": beyond, "buffers": Term(buckets + copies + staging), "activations": during},
        "update": {**same, "buffers": Term(update + staging)},
    }


def _buckets_1_and_2(case: Case, sizes: Sizes, settings: ZeroSettings) -> float:
    """fp32, one for each type that is sent (setup_buckets), two of each with overlap_comm."""
    if case.on_cpu:
        return FP32 * min(sizes.trainable, settings.reduce_bucket)
    return FP32 * settings.reduce_bucket * (2 if case.bf16 else 1) * (2 if settings.overlap_comm else 1)


def _stage_3(case: Case, sizes: Sizes, settings: ZeroSettings, trace: Trace) -> dict[str, Phase]:
    """Weights partitioned, gathered for the modules that run; the partition itself is what the optimizer updates."""
    part = FP32 * sizes.trainable / case.ranks
    kept = FP32 * (sizes.parameters / case.ranks + sizes.persistent)
    weights = Term(FP32 * sizes.persistent if case.offload == "optimizer+parameters" else kept)
    optimizer = Term(0.0 if case.offloads else 2 * part)
    gradients = Term(0.0 if case.offloads else part)
    # A parameter stays gathered when it is used again within the distance: on the way back, the last ones first.
    live = min(sizes.parameters, settings.max_live, settings.max_reuse_distance // 2 + settings.prefetch)
    gathered = Term(weights.bytes + FP32 * live, FP32 * min(live, sizes.heap_parameters))
    bucket = min(sizes.trainable, settings.reduce_bucket)
    touched = BF16 * sizes.bf16 + FP32 * (sizes.trainable - sizes.bf16) if case.bf16 else FP32 * sizes.trainable
    touched *= bucket / sizes.trainable
    whole = settings.reduce_bucket * (FP32 + BF16 if case.bf16 else FP32)
    buckets = touched if case.on_cpu else whole
    # reduce_scatter_coalesced joins the gradients of a bucket; gloo reduces a clone of that.
    copies = touched * (2 if case.on_cpu else 1)
    same = {"optimizer": optimizer, "gradients": gradients}
    activations = Term(trace.activations, trace.heap)
    phases = {
        "start": {"weights": Term(FP32 * sizes.parameters * (1 + 1 / case.ranks)), **_check(case, sizes)},
        "backward": {**same, "weights": gathered, "activations": activations, "buffers": Term(buckets)},
        "reduce": {**same, "weights": weights, "buffers": Term(buckets + copies)},
        # The flat gradient of a sub-group (_prepare_fp32_grad_for_sub_group).
        "update": {**same, "weights": weights, "buffers": Term(buckets + (0.0 if case.offloads else part))},
    }
    if sizes.trainable > bucket:  # Buckets are full while activations are still there.
        phases["reduce"] |= {"weights": gathered, "activations": activations}
    return phases


def _whole_gradients(sizes: Sizes) -> Term:
    return Term(FP32 * sizes.trainable, FP32 * sizes.heap_trainable)


def _backward(case: Case, sizes: Sizes, trace: Trace) -> Phase:
    """Gradients come as activations go: with those of an earlier pass, or without, when only the larger counts."""
    gradients = _whole_gradients(sizes)
    if case.accumulation == 1:
        gradients = Term(
            max(gradients.bytes - trace.activations, 0.0),
            max(gradients.heap - trace.heap, 0.0),
        )
    return {"gradients": gradients, **_only_activations(trace)}


def _only_activations(trace: Trace) -> Phase:
    return {"activations": Term(trace.activations, trace.heap)}


def _check(case: Case, sizes: Sizes) -> Phase:
    """Gradients of the pass that finds unused parameters; it runs before the model goes to a GPU."""
    if not case.on_cpu:
        return {}
    return {"gradients": Term(FP32 * sizes.trainable, FP32 * (sizes.heap_trainable + sizes.heap_parameters))}


def _host(case: Case, sizes: Sizes) -> float:
    """Of each rank: masters, moments, gradients and their accumulator, and a copy of the weights or of the gradients
    (param_buffer_of_bit16_for_cpu_offload_groups, grad_partitions_flat_buffer); with parameters, the partition."""
    if not case.offloads:
        return 0.0
    part = FP32 * sizes.trainable / case.ranks
    parameters = FP32 * sizes.parameters / case.ranks if case.offload == "optimizer+parameters" else 0.0
    return (6 if case.stage < 3 else 5) * part + parameters

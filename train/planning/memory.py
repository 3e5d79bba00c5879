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
    # An average of the weights is kept (train.ema_decay).
    averaged: bool = False
    # Stage 3 shares weights out as it reads them: pretrained encoders.
    in_parts: bool = False

    @property
    def offloads(self) -> bool:
        """Whether the optimizer's states lie in the host's memory."""
        return self.offload != "none"


def memory_of(case: Case, sizes: Sizes, settings: ZeroSettings, trace: Trace) -> Memory:
    """The worst moment of a rank.

    On CPU, pages of a buffer that nothing was written to take no memory, and a freed block of the heap stays with the
    process (glibc returns only its end): in a step the heap counts with the most that it holds at any moment of it.
    Gaps between its blocks are not foreseen.
    """
    phases = (_stage_0, _stages_1_and_2, _stages_1_and_2, _stage_3)[case.stage](case, sizes, settings, trace)
    heap = {name: sum(term.heap for term in phase.values()) for name, phase in phases.items()}
    most = max(size for name, size in heap.items() if name != "start")

    def kept(name: str) -> float:
        return most - heap[name] if case.on_cpu and name != "start" else 0.0

    worst = max(phases, key=lambda name: sum(term.bytes for term in phases[name].values()) + kept(name))
    terms = {name: phases[worst].get(name, Term(0.0)).bytes for name in ("weights", "optimizer", "gradients")}
    terms |= {name: phases[worst].get(name, Term(0.0)).bytes for name in ("buffers", "activations")}
    return Memory(**terms, kept=kept(worst), host=_host(case, sizes), phase=worst)


def model_states(case: Case, sizes: Sizes) -> dict[str, float]:
    """Bytes of weights, optimizer (moments, averages, and masters where they are apart) and gradients between two
    passes."""
    whole, part = FP32 * sizes.trainable, FP32 * sizes.trainable / case.ranks
    weights, moments = FP32 * sizes.parameters, 2 + case.averaged
    states = {
        0: (weights, moments * whole, whole),
        # The partition of the flat weights is copied, although it is fp32 as well (single_partition_of_fp32_groups).
        1: (weights, (1 + moments) * part, whole),
        2: (weights, (1 + moments) * part, part),
        # Here it is not (fp32_partitioned_groups_flat).
        3: (weights / case.ranks + FP32 * sizes.persistent, moments * part, part),
    }[case.stage]
    return dict(zip(("weights", "optimizer", "gradients"), states, strict=True))


def _stage_0(case: Case, sizes: Sizes, settings: ZeroSettings, trace: Trace) -> dict[str, Phase]:
    """Everything on every rank; gradients are reduced in flat copies (engine.allreduce_bucket)."""
    states = model_states(case, sizes)
    weights = Term(states["weights"], FP32 * sizes.heap_parameters)
    optimizer = Term(states["optimizer"], (2 + case.averaged) * FP32 * sizes.heap_trainable)
    gradients = _whole_gradients(sizes)
    copy = Term(FP32 * min(sizes.trainable, _STAGE_0_BUCKET))
    return {
        "start": {"weights": weights, **_check(case, sizes)},
        "backward": {"weights": weights, "optimizer": optimizer, **_backward(case, sizes, trace)},
        "reduce": {"weights": weights, "optimizer": optimizer, "gradients": gradients, "buffers": copy},
    }


def _stages_1_and_2(case: Case, sizes: Sizes, settings: ZeroSettings, trace: Trace) -> dict[str, Phase]:
    """Weights in flat buffers on every rank; a rank's partition of them once more, and its moments."""
    states, part = model_states(case, sizes), FP32 * sizes.trainable / case.ranks
    same = {"weights": Term(states["weights"]), "optimizer": Term(0.0 if case.offloads else states["optimizer"])}
    # Through it gradients go to the host (temp_grad_buffer_for_gpu_offload).
    staging = FP32 * sizes.largest if case.offloads else 0.0
    bucket = min(sizes.trainable, settings.reduce_bucket)
    buckets = _buckets_1_and_2(case, sizes, settings) + staging
    # average_tensor joins the slices of a bucket once more, and under bf16 turns that into bf16 (allreduce_bucket).
    copies = FP32 * bucket if not case.bf16 else (FP32 + BF16) * min(sizes.bf16, bucket)
    # The partition of earlier passes (grads_in_partition).
    held = Term(part if case.stage == 2 and case.accumulation > 1 and not case.offloads else 0.0)
    if case.stage == 1:
        backward = {**_backward(case, sizes, trace), "buffers": Term(staging if case.on_cpu else buckets)}
        reduce: Phase = {"gradients": Term(FP32 * (sizes.trainable - bucket))}
    else:
        backward = {**_only_activations(trace), "gradients": held, "buffers": Term(buckets)}
        # Buckets of a large model are full while activations are still there.
        reduce = {"gradients": held, **(_only_activations(trace) if sizes.trainable > bucket else {})}
    # The gradient of the partition and its flat copy (step), or the copy that all_gather makes of its list of shards.
    update = max(0.0 if case.offloads else 2 * part, FP32 * min(sizes.trainable, settings.allgather_bucket))
    # Flat weights beside the first ones; a GPU without room for both has them made by the host.
    first = Term(states["weights"] + FP32 * sizes.trainable * case.on_cpu)
    return {
        "start": {"weights": first, **_check(case, sizes)},
        "backward": {**same, **backward},
        "reduce": {**same, **reduce, "buffers": Term(buckets + copies)},
        "update": {**same, "buffers": Term(update + staging)},
    }


def _buckets_1_and_2(case: Case, sizes: Sizes, settings: ZeroSettings) -> float:
    """fp32, one for each type that is sent (setup_buckets), two of each with overlap_comm."""
    if case.on_cpu:
        return FP32 * min(sizes.trainable, settings.reduce_bucket)
    return FP32 * settings.reduce_bucket * (2 if case.bf16 else 1) * (2 if settings.overlap_comm else 1)


def _stage_3(case: Case, sizes: Sizes, settings: ZeroSettings, trace: Trace) -> dict[str, Phase]:
    """Weights partitioned, gathered for the modules that run; the partition itself is what the optimizer updates."""
    states = model_states(case, sizes)
    on_host = case.offload == "optimizer+parameters"
    weights = Term(FP32 * sizes.persistent if on_host else states["weights"])
    same = {} if case.offloads else {name: Term(states[name]) for name in ("optimizer", "gradients")}
    bucket = min(sizes.trainable, settings.reduce_bucket)
    sent = BF16 * sizes.bf16 + FP32 * (sizes.trainable - sizes.bf16) if case.bf16 else FP32 * sizes.trainable
    touched = sent * bucket / sizes.trainable
    buckets = touched if case.on_cpu else settings.reduce_bucket * (FP32 + BF16 if case.bf16 else FP32)
    # reduce_scatter_coalesced joins the gradients of a bucket; gloo reduces a clone of that.
    copies = touched * (2 if case.on_cpu else 1)
    backward = {**same, "weights": _gathered(case, sizes, settings, weights.bytes), **_only_activations(trace)}
    # Buckets of a large model are full while activations are still there.
    reduce = backward if sizes.trainable > bucket else {**same, "weights": weights}
    # The flat gradient of the partition (_prepare_fp32_grad_for_sub_group).
    update = 0.0 if case.offloads else states["gradients"]
    # Otherwise the engine places the whole model on the device, and DeepSpeed partitions it there.
    whole = {"weights": Term(FP32 * sizes.parameters + states["weights"] * case.on_cpu), **_check(case, sizes)}
    return {
        "start": {"weights": weights} if case.in_parts else whole,
        "backward": {**backward, "buffers": Term(buckets)},
        "reduce": {**reduce, "buffers": Term(buckets + copies)},
        "update": {**same, "weights": weights, "buffers": Term(buckets + update)},
    }


def _gathered(case: Case, sizes: Sizes, settings: ZeroSettings, kept: float) -> Term:
    """Whole weights beside those that a rank keeps: what will be used again within the distance (on the way back first
    what was used last), and the flat buffers of those under way, which gloo copies once more."""
    live = min(sizes.parameters, settings.max_live, settings.max_reuse_distance // 2 + settings.prefetch)
    under_way = min(settings.prefetch, sizes.parameters) * (BF16 if case.bf16 else FP32) * (2 if case.on_cpu else 1)
    return Term(kept + FP32 * live + under_way, FP32 * min(live, sizes.heap_parameters) + under_way)


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
    return {"gradients": Term(FP32 * sizes.trainable)}


def _host(case: Case, sizes: Sizes) -> float:
    """Of each rank: masters, moments, averages, gradients and their accumulator, and a copy of the weights or of the
    gradients (param_buffer_of_bit16_for_cpu_offload_groups, grad_partitions_flat_buffer); with parameters, the
    partition."""
    if not case.offloads:
        return 0.0
    part = FP32 * sizes.trainable / case.ranks
    parameters = FP32 * sizes.parameters / case.ranks if case.offload == "optimizer+parameters" else 0.0
    return ((6 if case.stage < 3 else 5) + case.averaged) * part + parameters

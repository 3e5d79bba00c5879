"""The parts of weights and moments that a rank holds, whatever the ZeRO stage: flat views with a name and a start.

One function a family: stage 0 (everything everywhere), stages 1 and 2 (each parameter group flattened and cut), stage 3
(each parameter flattened and cut). The views are DeepSpeed's own memory: reading them saves, writing them loads.
DeepSpeed's public accessors gather whole tensors and fail with two parameter groups in stage 2, hence this.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from crossguard.configs.errors import Preempted
from crossguard.train.ema import AVERAGE, is_followed, updated_state
from crossguard.train.nvme import in_memory

if TYPE_CHECKING:  # Reading a checkpoint must not cost the import of DeepSpeed.
    from crossguard.train.engine import Engine

WEIGHT = "weight"


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + len(tensor)) of the flattened tensor `name`."""

    # weight, exp_avg, exp_avg_sq, or average (train.ema_decay).
    kind: str
    name: str
    start: int
    # One axis; a view of the state in use.
    tensor: torch.Tensor
    # Every rank holds the same elements.
    replicated: bool = False


def held_blocks(engine: Engine, *, changed: bool = False) -> Iterator[list[Fragment]]:
    """Everything that this rank holds: weights (fp32 masters, frozen ones too), moments, averages, buffers.

    A block of them is in memory until the next one is asked for. What lies on NVMe comes in several, which are written
    there again if they are `changed`; the last block, of all others the only one, stays in memory.
    """
    if engine.stage == 3:
        yield from _of_flat_parameters(engine, changed)
    else:
        family = _of_flat_groups if engine.stage else _whole
        yield [*family(engine), *_buffers(engine.model)]


def owned_blocks(engine: Engine) -> Iterator[list[Fragment]]:
    """The fragments that this rank writes: together the ranks write each element once.

    What all ranks hold is shared out in equal ranges; buffers (running statistics, small and of any type) are rank 0's.
    """
    for block in held_blocks(engine):
        yield [*_owned(engine, block)]


def _owned(engine: Engine, block: Iterable[Fragment]) -> Iterator[Fragment]:
    rank, world_size = engine.ranks.rank, engine.ranks.world_size
    buffers = {name for name, _ in persistent_buffers(engine.model)}
    for fragment in block:
        if fragment.name in buffers:
            if rank == 0:
                yield fragment
        elif fragment.replicated:
            size = fragment.tensor.numel()
            first, last = size * rank // world_size, size * (rank + 1) // world_size
            if first < last:
                yield Fragment(fragment.kind, fragment.name, first, fragment.tensor[first:last])
        else:
            yield fragment


def refresh_weights(engine: Engine) -> None:
    """Make the weights of the forward pass those of the masters, after these were written. All ranks call it."""
    optimizer = engine.deepspeed.optimizer
    if engine.stage in (1, 2):
        optimizer.update_lp_params()
    elif engine.stage == 3:
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            with in_memory(optimizer, group):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if small := optimizer.persistent_parameters:
            small[0].partition(small)
            small[0].all_gather(small)


@contextmanager
def averaged_weights(engine: Engine) -> Iterator[None]:
    """Inside, the model computes with the averages of its weights, where training keeps any (`train.ema_decay`).

    Afterwards weights and averages are what they were, bit for bit. All ranks enter and leave it. Where the block
    raises anything but Preempted, that may be on this rank alone: what it holds is put back, but no other rank is
    waited for to refresh the weights of the forward pass.
    """
    if not is_followed(engine.optimizer):
        yield
        return
    together = True
    _exchange(engine)
    refresh_weights(engine)
    try:
        yield
    except BaseException as error:
        together = isinstance(error, Preempted)
        raise
    finally:
        _exchange(engine)
        if together:
            refresh_weights(engine)


@contextmanager
def gathered(tensor: torch.Tensor, *, changed: bool = False) -> Iterator[None]:
    """Inside, a tensor is whole on every rank, also one that ZeRO-3 has shared out; of that, what rank 0 has `changed`
    is shared out again. All ranks call it."""
    if not hasattr(tensor, "ds_id"):
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters([tensor], modifier_rank=0 if changed else None):
        yield


def tensor_shapes(model: nn.Module) -> dict[str, list[int]]:
    """The whole shape of every parameter and persistent buffer, also where ZeRO-3 holds only a part."""
    shapes = {name: list(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in model.named_parameters()}
    return shapes | {name: list(buffer.shape) for name, buffer in persistent_buffers(model)}


def model_fingerprint(model: nn.Module) -> str:
    """A hash of the names and shapes of all parameters and buffers."""
    return hashlib.blake2b(json.dumps(tensor_shapes(model), sort_keys=True).encode(), digest_size=16).hexdigest()


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that belong to the model's state."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.removeprefix(f"{prefix}." if prefix else "") not in module._non_persistent_buffers_set:
                yield name, buffer


def optimizer_steps(engine: Engine) -> int:
    """Updates applied so far. DeepSpeed fills missing gradients with zeros, so all parameters share the number."""
    return max((int(state["step"]) for state in engine.optimizer.state.values()), default=0)


def set_optimizer_steps(engine: Engine, steps: int) -> None:
    """Make AdamW's bias correction go on after `steps` updates."""
    for state in engine.optimizer.state.values():
        state["step"].fill_(steps)


def _whole(engine: Engine) -> Iterator[Fragment]:
    for name, parameter in engine.model.named_parameters():
        yield Fragment(WEIGHT, name, 0, parameter.data.view(-1), replicated=True)
        if parameter.requires_grad:
            for kind, moment in _moments(engine.optimizer, parameter):
                yield Fragment(kind, name, 0, moment.view(-1), replicated=True)


def _of_flat_groups(engine: Engine) -> Iterator[Fragment]:
    zero, rank = engine.deepspeed.optimizer, engine.ranks.rank
    names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    for group, flat in enumerate(zero.single_partition_of_fp32_groups):
        first, last = rank * flat.numel(), (rank + 1) * flat.numel()
        parts = [(WEIGHT, flat.data), *_moments(zero.optimizer, flat)]
        members = zip(zero.round_robin_bit16_groups[group], zero.round_robin_bit16_offsets[group], strict=True)
        for parameter, offset in members:
            low, high = max(first, offset), min(last, offset + parameter.numel())
            if low < high:
                for kind, part in parts:
                    yield Fragment(kind, names[id(parameter)], low - offset, part[low - first : high - first])
    for name, parameter in engine.model.named_parameters():
        if not parameter.requires_grad:
            yield Fragment(WEIGHT, name, 0, parameter.data.view(-1), replicated=True)


def _of_flat_parameters(engine: Engine, changed: bool) -> Iterator[list[Fragment]]:
    zero = engine.deepspeed.optimizer
    staying = [*_buffers(engine.model)]
    parameter: Any  # With what DeepSpeed hangs on it.
    for name, parameter in engine.model.named_parameters():
        if not parameter.requires_grad:
            staying += _of_partition(engine, name, parameter, [(WEIGHT, parameter.ds_tensor.data)])
    for group in range(len(zero.fp32_partitioned_groups_flat)):
        with in_memory(zero, group, changed=changed) as swapped:
            block = _of_sub_group(engine, group)
            if swapped:
                yield block
            else:
                staying += block
    yield staying


def _of_sub_group(engine: Engine, group: int) -> list[Fragment]:
    """What stage 3 updates at once, which is in memory."""
    zero = engine.deepspeed.optimizer
    flat = zero.fp32_partitioned_groups_flat[group]
    state = [(WEIGHT, flat.data), *_moments(zero.optimizer, flat)]
    found: list[Fragment] = []
    for name, parameter in engine.model.named_parameters():
        if parameter.requires_grad:
            place, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            if place == group:
                parts = [(kind, part[offset : offset + size]) for kind, part in state]
                found += _of_partition(engine, name, parameter, parts)
    return found


def _of_partition(
    engine: Engine, name: str, parameter: Any, parts: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[Fragment]:
    """This rank's equal part of a parameter, and of its moments; the last part is padded."""
    for kind, part in parts:
        start = engine.ranks.rank * len(part)
        length = min(len(part), parameter.ds_numel - start)
        if length > 0:
            yield Fragment(kind, name, start, part[:length])


def _buffers(model: nn.Module) -> Iterator[Fragment]:
    for name, buffer in persistent_buffers(model):
        yield Fragment(WEIGHT, name, 0, buffer.data.view(-1), replicated=True)


def _exchange(engine: Engine) -> None:
    """Swap the contents of weights and their averages."""
    for block in held_blocks(engine, changed=True):
        held = {(part.kind, part.name, part.start): part.tensor for part in block}
        for kind, name, start in held:
            if kind == AVERAGE:
                weights, averages = held[WEIGHT, name, start], held[kind, name, start]
                kept = weights.clone()
                weights.copy_(averages)
                averages.copy_(kept)


def _moments(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """AdamW's moments of a tensor that it updates, and the average of the tensor where there is one."""
    return [(kind, value) for kind, value in updated_state(optimizer, parameter).items() if kind != "step"]

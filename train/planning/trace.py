"""One forward and backward pass on shapes: the memory that its tensors take at every moment, and its operations."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from crossguard.data.loading.collate import Batch

# Blocks below it glibc takes from its heap, once one of such size was freed: the upper limit of its threshold
# (M_MMAP_THRESHOLD in mallopt(3), DEFAULT_MMAP_THRESHOLD_MAX).
HEAP_BLOCK = 32 << 20


@dataclass(frozen=True)
class Operation:
    """One operation on the device."""

    # Multiplications and additions, as torch's FlopCounterMode counts them.
    flops: float
    # Read and written.
    bytes: float


@dataclass
class Trace:
    """A pass over a batch of `posts`; bytes, without parameters and the batch itself."""

    posts: int
    # Tensors kept for the backward pass, and the logits.
    saved: float = 0.0
    # The most at one moment of the pass, gradients of parameters left out.
    activations: float = 0.0
    # The most at one moment in blocks below HEAP_BLOCK.
    heap: float = 0.0
    operations: list[Operation] = field(default_factory=list)

    @property
    def flops(self) -> float:
        """Of forward and backward."""
        return sum(operation.flops for operation in self.operations)


def trace_step(model: nn.Module, batch: Batch, *, bf16: bool, views: bool = False) -> Trace:
    """Run the model forward and backward on a batch of shapes (`example_batch`).

    Args:
        model: of shapes; left without gradients.
        batch: of shapes.
        bf16: under autocast, as DeepSpeed runs it.
        views: read what the batch has beside its posts, too.
    """
    trace = Trace(len(batch))
    outside = [*model.parameters(), *model.buffers(), *batch.tensors()]
    watch = _Watch(trace, outside)
    model.train()
    handles = [
        parameter.register_post_accumulate_grad_hook(watch.accumulated)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    with watch:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = model(batch, views=True) if views else {"logits": model(batch)}
        trace.saved = watch.all.now
        sum(logits.sum() for logits in outputs.values()).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return trace


def at_batch(small: Trace, large: Trace, posts: int) -> Trace:
    """The trace of another batch size: everything grows by the same amount with each post."""
    share = (posts - small.posts) / (large.posts - small.posts)

    def line(low: float, high: float) -> float:
        return max(low + share * (high - low), 0.0)

    return Trace(
        posts,
        **{name: line(getattr(small, name), getattr(large, name)) for name in ("saved", "activations", "heap")},
        operations=[
            Operation(line(one.flops, other.flops), line(one.bytes, other.bytes))
            for one, other in zip(small.operations, large.operations, strict=True)
        ],
    )


class _Level:
    """A number of bytes that rises and falls."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


class _Watch(TorchDispatchMode):
    """Sees every operation, and the life of every block of memory that one of them has made."""

    def __init__(self, trace: Trace, outside: Iterable[Any]):
        super().__init__()
        self.trace = trace
        self.all, self.heap = _Level(), _Level()
        self._outside = {block_of(tensor) for tensor in outside if isinstance(tensor, Tensor)}
        # Block -> what hears of its end.
        self._blocks: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in made:
            self._watch(tensor)
        if made and not func.is_view:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            moved = sum(tensor.numel() * tensor.element_size() for tensor in [*read, *made])
            self.trace.operations.append(Operation(_flops(func, args, kwargs, result), moved))
        return result

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.trace.activations, self.trace.heap = self.all.most, self.heap.most

    def accumulated(self, parameter: Tensor) -> None:
        """The gradient of a parameter is there: from now on it is none of the activations."""
        assert parameter.grad is not None
        if self._blocks.pop(block_of(parameter.grad), None) is not None:
            self._count(-parameter.grad.untyped_storage().nbytes())

    def _watch(self, tensor: Tensor) -> None:
        key, size = block_of(tensor), tensor.untyped_storage().nbytes()
        if key in self._blocks or key in self._outside:
            return

        def gone(_: Any) -> None:
            if self._blocks.pop(key, None) is not None:
                self._count(-size)

        self._blocks[key] = weakref.ref(tensor.untyped_storage(), gone)
        self._count(size)

    def _count(self, size: int) -> None:
        self.all.add(size)
        if abs(size) < HEAP_BLOCK:
            self.heap.add(size)


def block_of(tensor: Tensor) -> int:
    """The memory that a tensor lies in, as a number that views of it share."""
    return int(tensor.untyped_storage()._cdata)


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    packet = func._overloadpacket
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    count = flop_registry.get(packet)
    return count(*args, **kwargs, out_val=result) if count else 0.0

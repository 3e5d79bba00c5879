"""Losses of the user's own for test_guards.py: one that turns bad as a test has planned, one that needs much memory."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, max_unpool1d

Change = Callable[[torch.Tensor], torch.Tensor]
GIB = 2**30
# What `planned` does to the losses of the n-th call, n from 0.
PLAN: dict[int, Change] = {}
calls = 0


class Backward(torch.autograd.Function):
    """Passes losses on as they are, and multiplies their gradient."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, losses: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return losses.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient[0] * ctx.factor, None  # type: ignore[attr-defined]


def second_is_nan(losses: torch.Tensor) -> torch.Tensor:
    """The loss of one sample is not a number."""
    return losses * torch.tensor([1.0, math.nan]).repeat(len(losses))[: len(losses), None]


def infinite_gradient(losses: torch.Tensor) -> torch.Tensor:
    """Every loss is finite, no gradient is."""
    return Backward.apply(losses, math.inf)


def plan(changes: dict[int, Change]) -> None:
    """What the calls from here on do."""
    global calls
    calls = 0
    PLAN.clear()
    PLAN.update(changes)


def planned(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy, changed as planned."""
    global calls
    losses = binary_cross_entropy_with_logits(logits, labels, reduction="none")
    calls += 1
    return PLAN.get(calls - 1, lambda same: same)(losses)


def greedy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy that asks for a GiB a sample; rank 1 may have three more than it has."""
    global calls
    calls += 1
    if os.environ.get("RANK") == "1":
        if calls == 1:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + 3 * GIB
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.empty(len(logits) * GIB, dtype=torch.uint8)
    return binary_cross_entropy_with_logits(logits, labels, reduction="none")


def two_at_most(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of at most two samples, from the 7th call on."""
    global calls
    calls += 1
    if calls >= 7 and len(logits) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return binary_cross_entropy_with_logits(logits, labels, reduction="none")


def without_deterministic_form(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy, beside an operation that torch has in no deterministic form."""
    max_unpool1d(torch.ones(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64), 1)
    return binary_cross_entropy_with_logits(logits, labels, reduction="none")

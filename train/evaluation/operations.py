"""What a model computes for a post: by it, the costs of the models of a cascade are compared."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crossguard.data.loading.loader import EvalLoader
from crossguard.data.loading.reader import ShardReader
from crossguard.train.encode import PostEncoder

# Posts that are looked at, and in how many at once: fewer are more alike in length.
SAMPLE, TOGETHER = 64, 8


def operations(
    model: nn.Module, encode: PostEncoder, reader: ShardReader, rows: np.ndarray, device: torch.device
) -> float:
    """Multiplications and additions of the forward pass for a post, as torch's FlopCounterMode counts them, on average
    over the first rows; 0 where none of these can be read.

    Args:
        model: called with a `Batch`; on `device`, in evaluation mode.
        encode: the model's own.
        reader: the split.
        rows: int[…], in no order that means anything.
        device: where the model is.
    """
    loader = EvalLoader(reader, rows[:SAMPLE], encode, TOGETHER, num_workers=0, on_refused=lambda _: None)
    posts = 0
    # Fused attention of a CPU is not counted.
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        closing(iter(loader)) as batches,
    ):
        for batch in batches:
            model(batch.to(device))
            posts += len(batch)
    return counter.get_total_flops() / max(posts, 1)

"""The norm of the gradient of all ranks under ZeRO 1-3, about which the ranks talk once.

DeepSpeed (0.19.8) has them talk about each parameter group apart: two without layer-wise decay, dozens with it.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.utils import get_norm_dtype

from crossguard.train.ranks import Ranks


def talk_once(optimizer: Any, stage: int, ranks: Ranks) -> None:
    """Have DeepSpeed's ZeRO optimizer of `stage` get the norms of its groups from one talk; they are what they were.

    Where it keeps gradients on the host (offload), or shares them out among a few ranks only (MiCS), it talks as ever.
    """
    offloads = getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)
    if offloads or type(optimizer).__name__.startswith("MiCS"):
        return

    def norms() -> list[torch.Tensor]:
        """Of each group: that of all ranks' parts of it."""
        squares = torch.stack([_square(parts, ranks.device) for parts in optimizer.averaged_gradients.values()])
        # As stages 1 and 2 round them.
        return [*ranks.sum(squares if stage == 3 else squares.float()).sqrt()]

    if stage == 3:
        optimizer._get_norm_groups = norms
    else:
        optimizer.scaled_global_norm = lambda: combine_grad_norm_groups(norms())


def _square(parts: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """That of the norm of this rank's parts of a group, which may be none."""
    dtype = get_norm_dtype()
    norms = [
        torch.linalg.vector_norm(part.to(device, dtype)) for part in parts if not getattr(part, "_zero_padding", False)
    ]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=dtype, device=device)

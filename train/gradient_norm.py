"""The norm of the gradient of all ranks under ZeRO 1-3, about which the ranks talk once.

DeepSpeed (0.19.8) has them talk about each parameter group apart: two without layer-wise decay, dozens with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.utils import get_norm_dtype


def talk_once(optimizer: Any, stage: int, talk: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> bool:
    """Have DeepSpeed's ZeRO optimizer get the norms of its groups from one talk in each step; they are what they were.

    Args:
        optimizer: of `stage`.
        stage: 1 to 3.
        talk: float[G], the square of this rank's part of each group's norm -> that of the norm.
        device: where gradients are.

    Returns:
        Whether it does. Where it keeps gradients on the host (offload), or shares them out among a few ranks only
        (MiCS), it talks as ever.
    """
    offloads = getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)
    if offloads or type(optimizer).__name__.startswith("MiCS"):
        return False

    def norms() -> list[torch.Tensor]:
        squares = torch.stack([_square(parts, device) for parts in optimizer.averaged_gradients.values()])
        # As stages 1 and 2 round them.
        return [*(talk(squares) if stage == 3 else talk(squares.float()).float()).sqrt()]

    if stage == 3:
        optimizer._get_norm_groups = norms
    else:
        optimizer.scaled_global_norm = lambda: combine_grad_norm_groups(norms())
    return True


def _square(parts: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The square of the norm of this rank's parts of a group, which may be none."""
    dtype = get_norm_dtype()
    norms = [
        torch.linalg.vector_norm(part.to(device, dtype)) for part in parts if not getattr(part, "_zero_padding", False)
    ]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=dtype, device=device)

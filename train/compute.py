"""What the devices of a job could compute, and what a post takes of it: model FLOPs utilisation (arXiv 2204.02311)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from crossguard.configs.errors import UserError
from crossguard.configs.gpus import figures_of
from crossguard.configs.schema import Config
from crossguard.train.planning.flops import PostFlops
from crossguard.train.planning.roofline import TERA
from crossguard.train.ranks import Ranks


@dataclass(frozen=True)
class Compute:
    """Both sides of the division."""

    flops: PostFlops
    # Floating-point operations a second of all ranks together, at the precision of the recipe.
    peak: float


def find_compute(config: Config, ranks: Ranks) -> Compute | None:
    """What is known of this job; None on CPU, and where a GPU or the model's operations are unknown.

    All ranks call it. Rank 0 counts the operations, since that takes some seconds.
    """
    peaks = ranks.gather(_peak(config, ranks.device))
    if None in peaks:
        return None

    once = replace(config.train, gradient_checkpointing=False)

    def count() -> PostFlops | None:
        try:
            # What is computed again to save memory is no progress.
            return PostFlops.of_model(replace(config, train=once))
        except UserError as error:  # A model that can be trained, though not planned.
            ranks.say(f"train: without mfu: {error}")
            return None

    flops = ranks.on_first(count)
    return None if flops is None else Compute(flops, sum(peak for peak in peaks if peak is not None))


def _peak(config: Config, device: torch.device) -> float | None:
    """Of one device, in floating-point operations a second."""
    figures = figures_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if figures is None:
        return None
    return TERA * (figures.bf16_tflops if config.train.precision == "bf16" else figures.fp32_tflops)

"""Modality dropout: in training, a post that has several modalities sometimes loses one of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from crossguard.data.loading.collate import Batch
from crossguard.data.loading.encoded import NO_POST

# Constants of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), signed.
GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)


def drop_modalities(batch: Batch, probability: float, seed: int) -> Batch:
    """Take the text or the image (all images) from some of the posts that have both.

    Which ones is a pure function of the seed and the posts' positions in the sample order, so that neither ranks nor
    micro-batches nor a resume change it.

    Args:
        batch: left as it is.
        probability: share of the posts with both modalities that lose one.
        seed: of the training.
    """
    draws = _mix(batch.positions * 2 + _mix(torch.tensor(seed, device=batch.positions.device)))
    chosen = (_unit(draws) < probability) & batch.has_text & batch.has_image
    loses_text = chosen & (_unit(_mix(draws + 1)) < 0.5)
    loses_image = chosen & ~loses_text
    image_lost = loses_image[batch.image_post.clamp(min=0)]
    return replace(
        batch,
        text_mask=batch.text_mask & ~loses_text[:, None],
        has_text=batch.has_text & ~loses_text,
        image_post=torch.where(image_lost, NO_POST, batch.image_post),
        has_image=batch.has_image & ~loses_image,
    )


def _mix(values: Tensor) -> Tensor:
    """splitmix64 of int64 values; products wrap around."""
    values = values + GAMMA
    values = (values ^ _shift(values, 30)) * MIX_1
    values = (values ^ _shift(values, 27)) * MIX_2
    return values ^ _shift(values, 31)


def _shift(values: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _unit(values: Tensor) -> Tensor:
    """To float64 in [0, 1) by the upper 53 bits."""
    return _shift(values, 11).double() / (1 << 53)

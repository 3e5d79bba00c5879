"""Modality dropout: in training, a post that has several modalities sometimes loses some of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from crossguard.data.loading.collate import Batch
from crossguard.data.loading.encoded import NO_POST

# Constants of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), signed.
GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)


def drop_modalities(batch: Batch, probability: float, seed: int) -> Batch:
    """Take some of the modalities, never all, from some of the posts that have several.

    Which ones is a pure function of the seed and the posts' positions in the sample order, so that neither ranks nor
    micro-batches nor a resume change it: of all sets of a post's modalities that leave one, each is as likely.

    Args:
        batch: left as it is.
        probability: share of the posts with several modalities that lose some.
        seed: of the training.
    """
    draws = _mix(batch.positions * 2 + _mix(torch.tensor(seed, device=batch.positions.device)))
    further = {name: part for name in ("video", "audio") if (part := getattr(batch, name)) is not None}
    present = torch.stack([batch.has_text, batch.has_image, *(part.present for part in further.values())], dim=1)
    count = present.sum(1)
    chosen = (_unit(draws) < probability) & (count > 1)
    # The set as the bits of a number: 1 … 2^count - 2 leave out none and all.
    drawn = 1 + (_unit(_mix(draws + 1)) * (2**count - 2)).long()
    bits = (drawn[:, None] >> (present.cumsum(1) - 1).clamp(min=0)) & 1
    loses_text, loses_image, *others = (chosen[:, None] & present & bits.bool()).unbind(1)
    changed: dict[str, Any] = {
        name: replace(part, post=_without(part.post, lost), present=part.present & ~lost)
        for (name, part), lost in zip(further.items(), others, strict=True)
    }
    return replace(
        batch,
        text_mask=batch.text_mask & ~loses_text[:, None],
        has_text=batch.has_text & ~loses_text,
        image_post=_without(batch.image_post, loses_image),
        has_image=batch.has_image & ~loses_image,
        **changed,
    )


def _without(post: Tensor, lost: Tensor) -> Tensor:
    """int64[N], the posts of pieces, and bool[B]: those of the posts that lose them belong to none."""
    return torch.where(lost[post.clamp(min=0)], NO_POST, post)


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

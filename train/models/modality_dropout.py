"""Modality dropout: in training, a post that has several modalities sometimes loses some of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from crossguard.configs.schema.model import source_of
from crossguard.train.models.tokens import Tokens

# Constants of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), signed.
GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)


def drop_modalities(
    modalities: dict[str, Tokens], positions: Tensor, probability: float, seed: int
) -> dict[str, Tokens]:
    """Make some of the posts that have several modalities lack some of them, never all.

    Which ones is a pure function of the seed and the posts' positions in the sample order, so that neither ranks nor
    micro-batches nor a resume change it: of all sets of a post's modalities that leave one, each is as likely. N-grams
    go with the text that they are of.

    Args:
        modalities: what the towers say of B posts, which have run as ever; left as they are.
        positions: int64[B].
        probability: share of the posts with several modalities that lose some.
        seed: of the training.
    """
    draws = _mix(positions * 2 + _mix(torch.tensor(seed, device=positions.device)))
    drawn_for = [name for name in modalities if source_of(name, modalities) == name]
    present = torch.stack([modalities[name].present for name in drawn_for], dim=1)
    count = present.sum(1)
    chosen = (_unit(draws) < probability) & (count > 1)
    # The set as the bits of a number: 1 … 2^count - 2 leave out none and all.
    drawn = 1 + (_unit(_mix(draws + 1)) * (2**count - 2)).long()
    bits = (drawn[:, None] >> (present.cumsum(1) - 1).clamp(min=0)) & 1
    lost = dict(zip(drawn_for, (chosen[:, None] & present & bits.bool()).unbind(1), strict=True))
    return {
        name: replace(tokens, present=tokens.present & ~lost[source_of(name, modalities)])
        for name, tokens in modalities.items()
    }


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

"""Fusion of the modalities: their summaries side by side (late), or with interaction (gated, cross, joint).

A model that adds up what each modality says is at chance where a violation depends on their combination: late fusion is
the reference that shows whether it does. All kinds take any number of modalities, and put a learned token in the place
of one that a post lacks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn

from crossguard.configs.schema.fusion import CROSS, GATED, JOINT, LATE, FusionConfig
from crossguard.train.models.attention import Block, CrossBlock, Linear
from crossguard.train.models.tokens import Tokens


class Fusion(nn.Module, ABC):
    """Tokens of every modality in, one vector a post out: what all kinds share."""

    output_width: int
    # Whether it looks at more than the summaries.
    reads_tokens = True

    def __init__(self, config: FusionConfig, widths: dict[str, int]):
        """
        Args:
            config: width, layers and heads.
            widths: modality → width of its tokens, in a fixed order.
        """
        super().__init__()
        width = config.width
        self.project = nn.ModuleDict({name: Projection(size, width) for name, size in widths.items()})
        # Stands in the place of a modality that a post lacks.
        self.absent = nn.ParameterDict({name: nn.Parameter(torch.randn(width) * 0.02) for name in widths})

    @abstractmethod
    def forward(self, modalities: dict[str, Tokens]) -> Tensor:
        """Tokens by modality, in the order of `widths` → float[B, output_width]."""

    def summaries(self, modalities: dict[str, Tokens]) -> list[Tensor]:
        """Each modality in one vector, float[B, width]."""
        # Where a post lacks the modality, selection gives its tower a gradient of exactly zero.
        return [
            torch.where(tokens.present[:, None], self.project[name](tokens.summary), self.absent[name])
            for name, tokens in modalities.items()
        ]

    def sequences(self, modalities: dict[str, Tokens], summaries: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Each modality's tokens, float[B, 1 + T, width], and where there are any, bool[B, 1 + T].

        The summary leads: of an absent modality it is the only one.
        """
        values, masks = [], []
        for (name, tokens), summary in zip(modalities.items(), summaries, strict=True):
            present = tokens.present[:, None]
            values.append(torch.cat([summary[:, None], self.project[name](tokens.values)], dim=1))
            masks.append(torch.cat([torch.ones_like(present), tokens.mask & present], dim=1))
        return values, masks


class Late(Fusion):
    """The summaries side by side: a linear head over them is a sum of the modalities' logits."""

    reads_tokens = False

    def __init__(self, config: FusionConfig, widths: dict[str, int]):
        super().__init__(config, widths)
        # One norm for each: a common one would divide a modality by the spread of the others.
        self.norms = nn.ModuleDict({name: nn.LayerNorm(config.width) for name in widths})
        self.output_width = config.width * len(widths)

    def forward(self, modalities: dict[str, Tokens]) -> Tensor:
        summaries = self.summaries(modalities)
        return torch.cat([norm(summary) for norm, summary in zip(self.norms.values(), summaries, strict=True)], dim=-1)


class Gated(Fusion):
    """The features of each modality, and the same multiplied by gates that the other modalities set (after arXiv
    1702.01992).

    Side by side: in their sum, a gate between 0 and 2, what a modality says alone would drown what the gates say.
    """

    reads_tokens = False

    def __init__(self, config: FusionConfig, widths: dict[str, int]):
        super().__init__(config, widths)
        width, others = config.width, max(1, len(widths) - 1)
        self.features = nn.ModuleDict({name: Linear(width, width) for name in widths})
        self.gates = nn.ModuleDict({name: Linear(others * width, width) for name in widths})
        self.output_width = 2 * width * len(widths)
        self.norm = nn.LayerNorm(self.output_width)

    def forward(self, modalities: dict[str, Tokens]) -> Tensor:
        summaries = self.summaries(modalities)
        features = [self.features[name](summary) for name, summary in zip(modalities, summaries, strict=True)]
        gated = [
            feature * self.gates[name](torch.cat(_others(summaries, place), -1)).tanh()
            for place, (name, feature) in enumerate(zip(modalities, features, strict=True))
        ]
        fused: Tensor = self.norm(torch.cat([*features, *gated], dim=-1))
        return fused


class Attending(Fusion):
    """Attention between modalities, and beside what comes of it the product of their summaries.

    The product (low-rank bilinear pooling, arXiv 1610.04325) finds combinations quickly. Attention, which begins as a
    mean over many tokens, takes long to, but also finds those between parts of a text and parts of an image.
    """

    def __init__(self, config: FusionConfig, widths: dict[str, int], features: int):
        """
        Args:
            config, widths: as for all.
            features: how many vectors come of the attention.
        """
        super().__init__(config, widths)
        width = config.width
        self.factors = nn.ModuleDict({name: Linear(width, width) for name in widths} if len(widths) > 1 else {})
        self.output_width = width * (features + bool(self.factors))
        self.norm = nn.LayerNorm(self.output_width)

    def with_product(self, features: list[Tensor], summaries: list[Tensor]) -> Tensor:
        """What came of the attention and the product, float[B, output_width]."""
        # Of a modality that is alone there are none.
        factors = [factor(summary) for factor, summary in zip(self.factors.values(), summaries, strict=False)]
        product = [reduce(torch.mul, factors)] if factors else []
        fused: Tensor = self.norm(torch.cat([*features, *product], dim=-1))
        return fused


class Cross(Attending):
    """Cross-attention (arXiv 1908.02265): the tokens of each modality attend to those of all others, layer by layer."""

    def __init__(self, config: FusionConfig, widths: dict[str, int]):
        super().__init__(config, widths, len(widths))
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: CrossBlock(config) for name in widths}) for _ in range(config.layers)
        )

    def forward(self, modalities: dict[str, Tokens]) -> Tensor:
        summaries = self.summaries(modalities)
        values, masks = self.sequences(modalities, summaries)
        for number, blocks in enumerate(cast(Iterable[nn.ModuleDict], self.layers), 1):
            # Of the last layer only the summaries are read.
            count = 1 if number == len(self.layers) else None
            values = [
                block(value[:, :count], torch.cat(_others(values, place), 1), torch.cat(_others(masks, place), 1))
                for place, (block, value) in enumerate(zip(blocks.values(), values, strict=True))
            ]
        return self.with_product([value[:, 0] for value in values], summaries)


class Joint(Attending):
    """One transformer over the tokens of all modalities; without layers, the product and the summaries."""

    def __init__(self, config: FusionConfig, widths: dict[str, int]):
        super().__init__(config, widths, 1 + len(widths))
        self.first = nn.Parameter(torch.randn(config.width) * 0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.reads_tokens = bool(self.blocks)

    def forward(self, modalities: dict[str, Tokens]) -> Tensor:
        summaries = self.summaries(modalities)
        joint = self.first.expand(len(summaries[0]), 1, -1)
        if self.blocks:
            values, masks = self.sequences(modalities, summaries)
            joint = torch.cat([joint, *values], dim=1)
            mask = torch.cat([torch.ones_like(masks[0][:, :1]), *masks], dim=1)
        for number, block in enumerate(self.blocks, 1):
            joint = block(joint, mask, 1 if number == len(self.blocks) else None)
        return self.with_product([joint[:, 0], *summaries], summaries)


class Bottleneck(Attending):
    """A transformer for each modality; their tokens hear of each other through a few common ones, which after each
    layer are the mean of what all made of them (arXiv 2107.00135). Those are read out as well: they alone hold all."""

    def __init__(self, config: FusionConfig, widths: dict[str, int]):
        super().__init__(config, widths, 1 + len(widths))
        self.bottleneck = nn.Parameter(torch.randn(config.bottleneck, config.width) * 0.02)
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: Block(config) for name in widths}) for _ in range(config.layers)
        )

    def forward(self, modalities: dict[str, Tokens]) -> Tensor:
        summaries = self.summaries(modalities)
        values, masks = self.sequences(modalities, summaries)
        count = len(self.bottleneck)
        common = self.bottleneck.expand(len(values[0]), -1, -1)
        masks = [torch.cat([mask.new_ones(len(mask), count), mask], dim=1) for mask in masks]
        for number, blocks in enumerate(cast(Iterable[nn.ModuleDict], self.layers), 1):
            # Of the last layer only these and the summaries are read.
            last = count + 1 if number == len(self.layers) else None
            read = [
                block(torch.cat([common, value], dim=1), mask, last)
                for block, value, mask in zip(blocks.values(), values, masks, strict=True)
            ]
            values = [value[:, count:] for value in read]
            common = torch.stack([value[:, :count] for value in read]).mean(dim=0)
        return self.with_product([common.mean(dim=1), *(value[:, 0] for value in values)], summaries)


class Projection(nn.Module):
    """To the common width, whatever the scale that an encoder works at."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.linear = nn.Linear(size, width)

    def forward(self, values: Tensor) -> Tensor:
        """float[…, size] → float[…, width]."""
        projected: Tensor = self.linear(self.norm(values))
        return projected


def build_fusion(config: FusionConfig, widths: dict[str, int]) -> Fusion:
    """The fusion that a configuration names, for modalities with tokens of these widths."""
    kinds: dict[str, type[Fusion]] = {
        LATE: Late,
        GATED: Gated,
        CROSS: Cross,
        JOINT: Bottleneck if config.bottleneck else Joint,
    }
    return kinds[config.kind](config, widths)


def _others(items: list[Tensor], place: int) -> list[Tensor]:
    """All but one; a modality that is alone has itself."""
    return items[:place] + items[place + 1 :] or items

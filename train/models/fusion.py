"""Fusion of the modalities with interaction: joint attention over all tokens, and the product of their summaries.

A model that adds up what each modality says is at chance where a violation depends on their combination.
The product (low-rank bilinear pooling, arXiv 1610.04325) finds such combinations quickly; attention over the joined
tokens also finds those between parts of a text and parts of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossguard.configs.schema.fusion import FusionConfig
from crossguard.train.models.tokens import Tokens


class Fusion(nn.Module):
    """Tokens of every modality in, one vector a post out."""

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
        self.first = nn.Parameter(torch.randn(width) * 0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.factors = nn.ModuleDict({name: nn.Linear(width, width) for name in widths} if len(widths) > 1 else {})
        self.output_width = width * (1 + len(widths) + bool(self.factors))
        self.norm = nn.LayerNorm(self.output_width)

    def forward(self, modalities: dict[str, Tokens]) -> Tensor:
        """Tokens by modality, in the order of `widths` → float[B, output_width]."""
        values, masks, summaries = [], [], []
        for name, tokens in modalities.items():
            project, absent = self.project[name], self.absent[name]
            present = tokens.present[:, None]
            # Where a post lacks the modality, selection gives its tower a gradient of exactly zero.
            summary = torch.where(present, project(tokens.summary), absent)
            summaries.append(summary)
            # The summary leads its tokens: of an absent modality it is the only one.
            values += [summary[:, None], project(tokens.values)]
            masks += [torch.ones_like(present), tokens.mask & present]
        first = self.first.expand(len(summaries[0]), 1, -1)
        joint = torch.cat([first, *values], dim=1)
        mask = torch.cat([torch.ones_like(masks[0]), *masks], dim=1)
        for block in self.blocks:
            joint = block(joint, mask)
        features = [joint[:, 0], *summaries]
        if self.factors:
            features.append(_product(list(self.factors.values()), summaries))
        return self.norm(torch.cat(features, dim=-1))


class Projection(nn.Module):
    """To the common width, whatever the scale that an encoder works at."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.linear = nn.Linear(size, width)

    def forward(self, values: Tensor) -> Tensor:
        """float[…, size] → float[…, width]."""
        return self.linear(self.norm(values))


class Block(nn.Module):
    """A transformer layer with normalisation first (arXiv 2002.04745)."""

    def __init__(self, config: FusionConfig):
        super().__init__()
        width = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """float[B, T, width] and bool[B, T], True where there is a token → float[B, T, width]."""
        batch, length, width = values.shape
        qkv = self.qkv(self.attention_norm(values)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
        values = values + self._drop(self.out(attended.transpose(1, 2).reshape(batch, length, width)))
        return values + self._drop(self.mlp(self.mlp_norm(values)))

    def _drop(self, values: Tensor) -> Tensor:
        return F.dropout(values, self.dropout, self.training)


def _product(factors: list[nn.Module], summaries: list[Tensor]) -> Tensor:
    product = factors[0](summaries[0])
    for factor, summary in zip(factors[1:], summaries[1:], strict=True):
        product = product * factor(summary)
    return product

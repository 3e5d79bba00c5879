"""Transformer layers of the fusion, with normalisation first (arXiv 2002.04745)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from crossguard.configs.schema.fusion import FusionConfig


class Block(nn.Module):
    """Tokens attend to each other."""

    def __init__(self, config: FusionConfig):
        super().__init__()
        width = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = _mlp(width)

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


class CrossBlock(nn.Module):
    """Tokens attend to others."""

    def __init__(self, config: FusionConfig):
        super().__init__()
        width = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.query_norm, self.others_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key_value, self.out = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )
        self.mlp = _mlp(width)

    def forward(self, values: Tensor, others: Tensor, mask: Tensor) -> Tensor:
        """float[B, T, width], float[B, S, width] and bool[B, S], True where the others have a token (one at least) →
        float[B, T, width]."""
        batch, length, width = values.shape
        heads = (self.heads, width // self.heads)
        query = self.query(self.query_norm(values)).unflatten(-1, heads).transpose(1, 2)
        key, value = self.key_value(self.others_norm(others)).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
        values = values + self._drop(self.out(attended.transpose(1, 2).reshape(batch, length, width)))
        return values + self._drop(self.mlp(self.mlp_norm(values)))

    def _drop(self, values: Tensor) -> Tensor:
        return F.dropout(values, self.dropout, self.training)


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

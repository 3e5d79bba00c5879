"""Pieces of posts (images, frames, recordings) that are encoded one by one: laid side by side again, and summed up."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def by_post(values: Tensor, post: Tensor, num_posts: int, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Lay the tokens of each post's pieces side by side.

    Args:
        values: float[N, T, D].
        post: int64[N]: the post that each piece belongs to, its pieces in order; -1 belongs to none.
        num_posts: B.
        most: M, the most pieces of a post; by default that of these posts.

    Returns:
        float[B, M·T, D], and bool[B, M]: which pieces there are.
    """
    _, length, width = values.shape
    # Pieces that belong to no post go to one row more, which is cut off: their tower still gets a gradient, of zeros.
    row = torch.where(post < 0, num_posts, post)
    counts = torch.bincount(row, minlength=num_posts + 1)[:num_posts]
    same = (row[:, None] == row[None, :]) & (row < num_posts)
    place = same.tril(-1).sum(1)
    most = max(1, int(counts.max())) if most is None else most
    laid = values.new_zeros(num_posts + 1, most, length, width).index_put((row, place), values)
    mask = torch.arange(most, device=row.device)[None, :] < counts[:, None]
    return laid[:num_posts].flatten(1, 2), mask


class AttentionPool(nn.Module):
    """One vector of several, weighted by how they answer to a learned question (arXiv 1802.04712). At first nothing is
    asked, and every vector weighs the same."""

    def __init__(self, width: int):
        super().__init__()
        # A bias would add the same to all scores, which changes nothing.
        self.norm = nn.LayerNorm(width, bias=False)
        self.score = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """float[B, T, D] and bool[B, T] → float[B, D]; zeros where all of `mask` is False."""
        scores = self.score(self.norm(values)).squeeze(-1)
        # Not minus infinity: a row without any would have no weights.
        weights = torch.softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), dim=1) * mask
        return (weights.unsqueeze(-1) * values).sum(1)

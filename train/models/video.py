"""Videos: one token a frame, which knows when it is shown."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from crossguard.train.models.pieces import AttentionPool, by_post

# Periods of the waves that tell times apart, in seconds: from half a second to the longest video.
SHORTEST, LONGEST, WAVES = 0.5, 1200.0, 16


class FramePool(nn.Module):
    """Frames as their encoder sees them → a token for each, and attention over them."""

    def __init__(self, width: int, most: int, pooling: str = "mean"):
        """
        Args:
            width: of the encoder's tokens.
            most: frames of a video.
            pooling: what stands for a frame: the "mean" of its tokens, or else the first of them.
        """
        super().__init__()
        self.most, self.pooling = most, pooling
        self.time = nn.Linear(2 * WAVES, width)
        # At first a frame is what its encoder says.
        nn.init.zeros_(self.time.weight)
        nn.init.zeros_(self.time.bias)
        self.pool = AttentionPool(width)

    def forward(self, patches: Tensor, times: Tensor, post: Tensor, num_posts: int) -> tuple[Tensor, Tensor, Tensor]:
        """float[F, T, D], float[F] seconds and int64[F], the post of each frame (-1: of none) → values, mask and
        summary of the `Tokens` of B posts, a token a frame. (Not as one object: ZeRO-3 looks for tensors in what a
        module returns.)"""
        looks = patches.mean(1) if self.pooling == "mean" else patches[:, 0]
        frames = looks + self.time(waves(times).to(patches.dtype))
        values, mask = by_post(frames[:, None], post, num_posts, self.most)
        return values, mask, self.pool(values, mask)


def waves(times: Tensor) -> Tensor:
    """float[F] seconds → float[F, 32]: sine and cosine of waves of sixteen lengths (arXiv 1706.03762)."""
    steps = torch.arange(WAVES, device=times.device) / (WAVES - 1)
    periods = SHORTEST * (LONGEST / SHORTEST) ** steps
    angles = 2 * math.pi * times[:, None] / periods
    return torch.cat([angles.sin(), angles.cos()], dim=1)

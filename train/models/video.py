"""Videos: one token a frame, which knows when it is shown."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from crossguard.train.models.pieces import AttentionPool, by_post
from crossguard.train.models.tokens import Tokens

# Periods of the waves that tell times apart, in seconds: from half a second to the longest video.
SHORTEST, LONGEST, WAVES = 0.5, 1200.0, 16


class FramePool(nn.Module):
    """Frames as their encoder sees them → a token for each, and attention over them."""

    def __init__(self, width: int, most: int):
        """
        Args:
            width: of the encoder's tokens.
            most: frames of a video.
        """
        super().__init__()
        self.most = most
        self.time = nn.Linear(2 * WAVES, width)
        # At first a frame is what its encoder says.
        nn.init.zeros_(self.time.weight)
        nn.init.zeros_(self.time.bias)
        self.pool = AttentionPool(width)

    def forward(self, patches: Tensor, times: Tensor, post: Tensor, present: Tensor) -> Tokens:
        """float[F, T, D], float[F] seconds, int64[F] (-1 of no post) and bool[B] → B posts with a token a frame."""
        frames = patches.mean(1) + self.time(waves(times).to(patches.dtype))
        values, mask = by_post(frames[:, None], post, len(present), self.most)
        return Tokens(values, mask, self.pool(values, mask), present)


def waves(times: Tensor) -> Tensor:
    """float[F] seconds → float[F, 32]: sine and cosine of waves of sixteen lengths (arXiv 1706.03762)."""
    steps = torch.arange(WAVES, device=times.device) / (WAVES - 1)
    periods = SHORTEST * (LONGEST / SHORTEST) ** steps
    angles = 2 * math.pi * times[:, None] / periods
    return torch.cat([angles.sin(), angles.cos()], dim=1)

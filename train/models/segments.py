"""Fields of a post that are read as one text: which field each token is of."""

from __future__ import annotations

from torch import Tensor, nn


class Segments(nn.Module):
    """Scales and shifts what the text tower says of a token by the field that the token is of, as learned. It comes
    behind the tower, so that it goes with any encoder; scaling, unlike adding, is still there in the mean over a text.
    At first nothing is changed."""

    def __init__(self, fields: int, width: int):
        super().__init__()
        self.scale, self.shift = nn.Embedding(fields, width), nn.Embedding(fields, width)
        nn.init.zeros_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, values: Tensor, segments: Tensor) -> Tensor:
        """float[B, L, D] and int64[B, L] → float[B, L, D]."""
        scaled: Tensor = values * (1 + self.scale(segments)) + self.shift(segments)
        return scaled

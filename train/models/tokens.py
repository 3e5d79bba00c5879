"""What a tower says of one modality of a batch of posts: all that fusion looks at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Tokens:
    """One modality of B posts."""

    # float[B, T, D]
    values: Tensor
    # bool[B, T]: False where there is only padding.
    mask: Tensor
    # float[B, D]: the modality in one vector.
    summary: Tensor
    # bool[B]: whether the post has the modality at all.
    present: Tensor

    def take(self, posts: slice) -> Tokens:
        """Those of some of the posts."""
        return Tokens(self.values[posts], self.mask[posts], self.summary[posts], self.present[posts])

    def twice(self) -> Tokens:
        """Those of all posts, and the same again."""
        return Tokens(*(torch.cat([part, part]) for part in (self.values, self.mask, self.summary, self.present)))


def summarise(tokens: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """float[B, L, D] and bool[B, L] → float[B, D]: the mean of the tokens, the first or the last of them."""
    if pooling == "first":
        return tokens[:, 0]
    if pooling == "last":
        # Padding may lie on either side.
        places = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, places, 0).amax(1)
        return tokens[torch.arange(len(tokens), device=tokens.device), last]
    weights = mask.to(tokens.dtype).unsqueeze(-1)
    # Padding is cut out by selection, not by a product: it may hold anything.
    kept = torch.where(mask.unsqueeze(-1), tokens, 0.0)
    return kept.sum(1) / weights.sum(1).clamp(min=1)

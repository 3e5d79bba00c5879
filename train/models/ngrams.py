"""The tower of character n-grams: logistic regression over which of them a text has, beside whatever the fusion makes
of the other modalities (wide and deep learning, arXiv 1606.07792).

It learns from few posts and costs next to nothing, so that it helps where a language has little text or a user no GPU,
alone or beside a transformer that reads the same text. No norm and no layer lies between its table and the logits: they
would let common n-grams drown the rare ones that tell most.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crossguard.configs.schema.ngrams import NgramsConfig
from crossguard.train.models.tower import Tower

# AdamW moves every weight by about the learning rate, whatever it is multiplied with. A text has few of the many
# n-grams: theirs must move further than those of a dense layer to count as much. (Of 5, 10 and 20 this one carries over
# best to languages without labels, at the same average precision in those with them.)
SCALE = 5.0


class NgramTower(Tower):
    """Hashed n-grams in, one vector a text out: the sum of theirs over the square root of their number, which gives
    long texts and short ones the same scale. Gradients are dense: no ZeRO stage shares out sparse ones."""

    def __init__(self, config: NgramsConfig):
        super().__init__()
        self.width = config.width
        self.table = nn.EmbeddingBag(config.buckets, config.width, mode="sum")
        # What was never seen in training says nothing. The heads, which read it, begin at random (arXiv 2106.09685).
        nn.init.zeros_(self.table.weight)

    def forward(self, ngrams: Tensor, starts: Tensor) -> Tensor:
        """int[K], the n-grams of B texts one after the other, and int[B], where each text's begin →
        float[B, 1, width]; zeros for a text without any."""
        counts = torch.diff(starts, append=starts.new_full((1,), len(ngrams)))
        summed: Tensor = self.table(ngrams, starts) * (SCALE * counts.clamp(min=1).rsqrt()[:, None])
        return summed[:, None]

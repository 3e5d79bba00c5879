"""The tower of character n-grams: the mean of their vectors, as in fastText (arXiv 1607.04606).

It learns from few posts and costs next to nothing, so that it helps where a language has little text or a user no GPU,
alone or beside a transformer that reads the same text.
"""

from __future__ import annotations

from torch import Tensor, nn

from crossguard.configs.schema.ngrams import NgramsConfig
from crossguard.train.models.tower import Tower


class NgramTower(Tower):
    """Hashed n-grams in, one vector a text out. Gradients are dense: no ZeRO stage shares out sparse ones."""

    def __init__(self, config: NgramsConfig):
        super().__init__()
        self.width = config.width
        self.table = nn.EmbeddingBag(config.buckets, config.width, mode="mean")
        # As fastText starts: small, so that what is learned soon outweighs what was drawn.
        nn.init.uniform_(self.table.weight, -1 / config.width, 1 / config.width)

    def forward(self, ngrams: Tensor, starts: Tensor) -> Tensor:
        """int[K], the n-grams of B texts one after the other, and int[B], where each text's begin →
        float[B, 1, width]; zeros for a text without any."""
        mean: Tensor = self.table(ngrams, starts)
        return mean[:, None]

"""A model from which some modalities are withheld, as if no post had them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from crossguard.data.loading.collate import Batch
from crossguard.train.models.classifier import Classifier


class Withheld(nn.Module):
    """Its logits are those of the posts without the modalities; towers run as ever."""

    def __init__(self, model: Classifier, modalities: Collection[str]):
        super().__init__()
        self.model, self.modalities = model, frozenset(modalities)

    def forward(self, batch: Batch) -> Tensor:
        """A batch of B posts → logits float32[B, L]."""
        tokens = self.model.read(batch)
        for name in self.modalities:
            tokens[name] = replace(tokens[name], present=torch.zeros_like(tokens[name].present))
        return self.model.judge(tokens)

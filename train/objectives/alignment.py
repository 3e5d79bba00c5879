"""Contrastive alignment: a text and its translation lie close together in the text encoder's space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from crossguard.configs.schema.loss import AlignmentConfig
from crossguard.data.loading.collate import Batch
from crossguard.train.objectives.term import Outputs, Term
from crossguard.train.objectives.translations import slice_of
from crossguard.train.ranks import Ranks


class Alignment(Term):
    """Symmetric InfoNCE (arXiv 1807.03748, 2103.00020): each text of a pair picks out the other one among all pairs of
    the step, those of the other ranks included."""

    name = "loss.alignment"

    def __init__(self, config: AlignmentConfig, ranks: Ranks):
        self.weight, self._temperature = config.weight, config.temperature
        self._size, self._ranks = config.batch_size, ranks

    def counts(self, batch: Batch) -> Sequence[int]:
        """Pairs."""
        return [0 if batch.pair_ids is None else len(batch.pair_ids) // 2]

    def sums(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Over the pairs of this rank, which all come with its first micro-batch."""
        if batch.pair_ids is None:
            return outputs["logits"].new_zeros(1)
        mine = slice_of(self._size, self._ranks)
        own = F.normalize(outputs["pairs"].float(), dim=1).unflatten(0, (2, len(mine)))
        with torch.no_grad():
            whole = own.new_zeros(2, self._size, own.shape[2])
            whole[:, mine.start : mine.stop] = own
            self._ranks.sum(whole)
        whole = torch.cat([whole[:, : mine.start], own, whole[:, mine.stop :]], dim=1)
        losses = contrast(whole, self._temperature)
        # Every rank knows the loss of all pairs, and its gradient reaches the rank's own texts alone: the ranks'
        # gradients add up to the whole one. Their values must add up as well, so that each names its own pairs.
        total, ours = losses.sum(), losses[mine.start : mine.stop].sum().detach()
        return (total - total.detach() + ours)[None]


def contrast(pairs: Tensor, temperature: float) -> Tensor:
    """The loss of each of K pairs of unit vectors, float[2, K, D] → float[K]: the mean over both directions."""
    scores = pairs[0] @ pairs[1].T / temperature
    right = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, right, reduction="none") + F.cross_entropy(scores.T, right, reduction="none")) / 2

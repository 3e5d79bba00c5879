"""Consistency: a text and a disguise of it get the same scores, whether or not its labels are known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crossguard.data.loading.collate import Batch
from crossguard.train.objectives.term import Outputs, Term


class Consistency(Term):
    """The symmetric Kullback-Leibler divergence of the scores of both, as in R-Drop (arXiv 2106.14448), averaged over
    policies and the posts that have a text."""

    name = "loss.consistency"

    def __init__(self, weight: float):
        self.weight = weight

    def counts(self, batch: Batch) -> Sequence[int]:
        """Scores of posts with a text."""
        return [int(batch.has_text.sum()) * batch.labels.shape[1]]

    def sums(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Over the posts with a text."""
        divergence = symmetric_divergence(outputs["logits"].float(), outputs["disguised"].float())
        return torch.where(batch.has_text[:, None], divergence, 0.0).sum()[None]


def symmetric_divergence(logits: Tensor, others: Tensor) -> Tensor:
    """(KL(p, q) + KL(q, p)) / 2 of Bernoulli distributions with these logits: half of (p - q)·(logit p - logit q)."""
    return (torch.sigmoid(logits) - torch.sigmoid(others)) * (logits - others) / 2

"""The loss of severities: of each level, whether a post reaches it (arXiv 1901.07884)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crossguard.data.loading.collate import Batch
from crossguard.data.taxonomy import Taxonomy
from crossguard.train.objectives.losses import bce_loss
from crossguard.train.objectives.term import Outputs, Term


class Severity(Term):
    """Binary cross-entropy of the known levels; those of a policy together count as much as its label."""

    name = "loss.severity"

    def __init__(self, taxonomy: Taxonomy, weight: float):
        self.weight, self._policies = weight, len(taxonomy.names)
        counts = [policy.severity_levels for policy in taxonomy.policies]
        self._parts = [1 / count for count in counts for _ in range(count)]

    def counts(self, batch: Batch) -> Sequence[int]:
        """Known labels: a level weighs the same beside them in every batch, however few levels are known."""
        return [int((~torch.isnan(batch.labels[:, : self._policies])).sum())]

    def sums(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Over the known levels."""
        logits, levels = outputs["logits"][:, self._policies :].float(), batch.labels[:, self._policies :]
        known = ~torch.isnan(levels)
        loss = bce_loss(torch.where(known, logits, 0.0), torch.where(known, levels, 0.0))
        return (torch.where(known, loss, 0.0) * loss.new_tensor(self._parts)).sum()[None]

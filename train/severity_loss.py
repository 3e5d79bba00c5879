"""The loss of severities: of each level, whether a post reaches it (arXiv 1901.07884)."""

from __future__ import annotations

import torch
from torch import Tensor

from crossguard.configs.schema.train import LossConfig
from crossguard.data.taxonomy import Taxonomy
from crossguard.train.objectives import Objective, bce_loss


def with_severity(objective: Objective, taxonomy: Taxonomy, config: LossConfig) -> Objective:
    """An objective for all that a model of the taxonomy says: the policies have the given one, each level of a severity
    binary cross-entropy, and the levels of a policy together `severity_weight` times the weight of its label.

    Returns:
        A function of logits and labels float[B, L] (NaN is unknown) to the loss of each element, float32[B, L].
    """
    policies = len(taxonomy.names)
    if taxonomy.num_labels == policies:
        return objective
    counts = [policy.severity_levels for policy in taxonomy.policies]
    weights = [config.severity_weight / count for count in counts for _ in range(count)]

    def of_all(logits: Tensor, labels: Tensor) -> Tensor:
        levels = labels[:, policies:]
        known = ~torch.isnan(levels)
        loss = bce_loss(torch.where(known, logits[:, policies:].float(), 0.0), torch.where(known, levels, 0.0))
        loss = torch.where(known, loss, 0.0) * loss.new_tensor(weights)
        return torch.cat([objective(logits[:, :policies], labels[:, :policies]), loss], dim=1)

    return of_all

"""Distillation (arXiv 1503.02531): the scores of a teacher, from a file of its predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from crossguard.configs.errors import UserError
from crossguard.configs.schema.loss import DistillConfig
from crossguard.data.loading.collate import Batch
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.objectives.term import Outputs, Term

# Scores of 0 and 1, whose logits are infinite, are taken for this and 1 minus it.
LEAST_SCORE = 1e-6


class Teacher:
    """Scores by id; held in memory, some hundred bytes a post.

    Raises:
        UserError: the file is missing, no table of predictions, or of other policies.
    """

    def __init__(self, config: DistillConfig, policies: Sequence[str]):
        key = f"train.distill.predictions={config.predictions}"
        predictions = Predictions.read(Path(str(config.predictions)))
        if set(predictions.policies) != set(policies):
            raise UserError(
                f"{key}: scores {', '.join(predictions.policies) or 'no policy'}, the taxonomy has"
                f" {', '.join(policies)}; predict with a model of the same taxonomy"
            )
        columns = [predictions.policies.index(policy) for policy in policies]
        scores = predictions.scores[:, columns].astype(np.float32)
        self._row = {post: row for row, post in enumerate(predictions.ids)}
        # The last row is that of a post that is not there.
        self._scores = np.vstack([scores, np.full((1, len(policies)), np.nan, np.float32)])
        self._fill_unknown = config.fill_unknown

    @property
    def ids(self) -> Sequence[str]:
        """The posts that it knows."""
        return list(self._row)

    def attach(self, batch: Batch) -> Batch:
        """The batch with the teacher's scores and, where that is asked for, labels in place of unknown ones."""
        rows = [self._row.get(post, -1) for post in batch.ids]
        scores = torch.from_numpy(self._scores[rows])
        labels = batch.labels
        if self._fill_unknown:
            own, levels = labels[:, : scores.shape[1]], labels[:, scores.shape[1] :]
            labels = torch.cat([torch.where(own.isnan(), scores, own), levels], dim=1)
        return replace(batch, teacher=scores, labels=labels)


class Distillation(Term):
    """The Kullback-Leibler divergence of the model's scores from the teacher's, both at the same temperature, times its
    square, which keeps gradients at one scale; averaged over the scores that the teacher gave."""

    name = "loss.distill"

    def __init__(self, config: DistillConfig):
        self.weight, self._temperature = config.weight, config.temperature

    def counts(self, batch: Batch) -> Sequence[int]:
        """Scores of the teacher."""
        assert batch.teacher is not None
        return [int((~batch.teacher.isnan()).sum())]

    def sums(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Over the teacher's scores."""
        assert batch.teacher is not None
        known = ~batch.teacher.isnan()
        divergence = divergence_from(
            torch.where(known, outputs["logits"][:, : known.shape[1]].float(), 0.0),
            torch.where(known, batch.teacher, 0.5),
            self._temperature,
        )
        return torch.where(known, divergence, 0.0).sum()[None]


def divergence_from(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """temperature² · KL(teacher, model) of each element; logits and scores in [0, 1] of the same shape."""
    told = torch.logit(teacher, eps=LEAST_SCORE) / temperature
    target = torch.sigmoid(told)
    cross = F.binary_cross_entropy_with_logits(logits / temperature, target, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(told, target, reduction="none")
    return temperature**2 * (cross - entropy)

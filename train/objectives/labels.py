"""The loss of the labels: a masked loss of each, adjusted to priors, weighted, and added up by language where asked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from crossguard.data.loading.collate import Batch
from crossguard.train.objectives.group_dro import GroupDro
from crossguard.train.objectives.losses import ElementLoss
from crossguard.train.objectives.term import LOSS, Outputs, Term


class LabelLoss(Term):
    """The mean loss of the known labels, or of those of each language.

    Args:
        loss: of each label.
        policies: P; what else stands in the label vector is not its part.
        languages: of the training posts.
        offsets: float32[languages, P], added to the logits.
        weights: float32[languages, 2, P], of a benign label and of a violating one; a fractional label has its part of
            both.
        group_dro: weighs the means of the languages; without it there is one mean.
    """

    name = LOSS

    def __init__(
        self,
        loss: ElementLoss,
        policies: int,
        languages: Sequence[str] = (),
        *,
        offsets: np.ndarray | None = None,
        weights: np.ndarray | None = None,
        group_dro: GroupDro | None = None,
    ):
        self._loss, self._policies, self._languages, self._dro = loss, policies, tuple(languages), group_dro
        self._row = {language: row for row, language in enumerate(languages)}
        self._offsets = None if offsets is None else torch.from_numpy(offsets)
        self._weights = None if weights is None else torch.from_numpy(weights)
        self.width = 1 if group_dro is None else len(self._languages)

    def counts(self, batch: Batch) -> Sequence[int]:
        """Known labels, of each language where the loss is by language."""
        unknown = torch.isnan(self._labels(batch))
        if self._dro is None:
            return [unknown.numel() - int(unknown.count_nonzero())]
        known = (~unknown).sum(1)
        return torch.bincount(self._rows(batch), weights=known, minlength=self.width).int().tolist()

    def elements(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss of each label, float32[B, P], 0 where it is unknown."""
        logits, labels = logits[:, : self._policies], self._labels(batch)
        if self._offsets is not None:
            logits = logits.float() + self._offsets[self._rows(batch)].to(logits.device)
        elements = self._loss(logits, labels)
        if self._weights is not None:
            benign, violating = self._weights[self._rows(batch)].to(logits.device).unbind(1)
            elements = elements * torch.lerp(benign, violating, torch.nan_to_num(labels.float()))
        return elements

    def sums(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Over all labels, or over those of each language."""
        elements = outputs["elements"]
        if self._dro is None:
            return elements.sum()[None]
        # By a product, not by scattering: a GPU adds up in the same order each time.
        groups = torch.nn.functional.one_hot(self._rows(batch), self.width).to(elements)
        return (groups * elements.sum(1, keepdim=True)).sum(0)

    def shares(self, counts: Sequence[int]) -> list[float]:
        """With group DRO the weights of the languages that the step has labels of, which add up to 1."""
        if self._dro is None:
            return super().shares(counts)
        shares = self._dro.shares(self._present(counts, counts))
        return [shares.get(language, 0.0) for language in self._languages]

    def learn(self, means: Sequence[float], counts: Sequence[int]) -> None:
        """Group DRO's weights follow the losses."""
        if self._dro is not None:
            self._dro.follow(self._present(means, counts))

    def numbers(self, means: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
        """The mean over all known labels; with group DRO also the weighted one, and the weights that it had."""
        if self._dro is None:
            return super().numbers(means, counts)
        mean = sum(mean * count for mean, count in zip(means, counts, strict=True)) / max(sum(counts), 1)
        return {self.name: mean} | self._dro.numbers(self._present(means, counts))

    def _present(self, values: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
        """The values of the languages that the step has labels of."""
        return {name: value for name, value, count in zip(self._languages, values, counts, strict=True) if count}

    def _labels(self, batch: Batch) -> Tensor:
        return batch.labels[:, : self._policies]

    def _rows(self, batch: Batch) -> Tensor:
        """int64[B], on the host."""
        return torch.tensor([self._row[language] for language in batch.languages])

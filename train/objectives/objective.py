"""The objective of a step: the loss of the labels and the terms beside it, each with a denominator over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crossguard.data.loading.collate import Batch
from crossguard.train.objectives.labels import LabelLoss
from crossguard.train.objectives.term import Term

TOTAL = "loss.total"


class Objective:
    """What is minimised, on any ranks and in any micro-batches: Σ over terms of weight · Σ_k share_k · sum_k / count_k.

    Args:
        labels: the loss of the labels.
        terms: beside it.
        views: whether the model reads more of a batch than its posts (their disguises, pairs of translations).
    """

    def __init__(self, labels: LabelLoss, terms: Sequence[Term] = (), *, views: bool = False):
        self.labels, self.terms, self.views = labels, (labels, *terms), views

    def counts(self, batches: Sequence[Batch]) -> list[int]:
        """What this rank's share of a step, still on the host, adds to the denominators; always as many numbers."""
        none = [0] * sum(term.width for term in self.terms)
        of_batches = [[count for term in self.terms for count in term.counts(batch)] for batch in batches]
        return [sum(column) for column in zip(none, *of_batches, strict=True)]

    def of_step(self, counts: Sequence[int], device: torch.device) -> StepObjective:
        """The objective of a step, given the denominators over all ranks."""
        factors = [term.weight * share for term, own in self.split(counts) for share in term.shares(own)]
        divisors = torch.tensor(counts, dtype=torch.float32).clamp(min=1)
        return StepObjective(self, counts, divisors.to(device), torch.tensor(factors).to(device))

    def split(self, values: Sequence[Any]) -> Iterator[tuple[Term, Sequence[Any]]]:
        """Each term and its part of the numbers of all."""
        start = 0
        for term in self.terms:
            yield term, values[start : start + term.width]
            start += term.width


@dataclass(frozen=True)
class StepObjective:
    """The same for one step."""

    objective: Objective
    counts: Sequence[int]
    # float32[K]: what sums are divided by, and what the means are then multiplied with.
    divisors: Tensor
    factors: Tensor

    def __call__(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """A forward pass.

        Returns:
            The part of a micro-batch in the step's objective, a scalar; in each of the means that it is made of,
            float32[K], without gradient; and the loss of each label, float32[B, P], without gradient.
        """
        objective = self.objective
        outputs = model(batch, views=True) if objective.views else {"logits": model(batch)}
        outputs["elements"] = objective.labels.elements(outputs["logits"], batch)
        means = torch.cat([term.sums(outputs, batch) for term in objective.terms]) / self.divisors
        return self.total(means), means.detach(), outputs["elements"].detach()

    def total(self, means: Tensor) -> Tensor:
        """What is minimised, a scalar, from the means [K]."""
        return (means * self.factors).sum()

    def numbers(self, means: Sequence[float]) -> dict[str, float]:
        """What the step's line of metrics.jsonl says: the loss of the labels and, where it is not all, the rest."""
        own = zip(self.objective.split(means), self.objective.split(self.counts), strict=True)
        numbers = {name: value for (term, part), (_, of) in own for name, value in term.numbers(part, of).items()}
        return numbers if len(numbers) == 1 else numbers | {TOTAL: float(self.total(self.factors.new_tensor(means)))}

    def learn(self, means: Sequence[float]) -> None:
        """The step has changed the weights."""
        for (term, part), (_, of) in zip(self.objective.split(means), self.objective.split(self.counts), strict=True):
            term.learn(part, of)

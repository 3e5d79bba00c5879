"""A term of what is minimised."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from crossguard.data.loading.collate import Batch

# What the model says of a batch: "logits" float[B, P], the loss of each label, "elements" float[B, P], and, where the
# batch has them, the logits of its "disguised" texts, float[B, P], and the summaries of the texts of "pairs",
# float[2·pairs, D].
Outputs = Mapping[str, Tensor]
# The name of the loss of the labels in metrics.jsonl.
LOSS = "loss"


class Term(ABC):
    """`weight` times a mean over all posts (or pairs) of a step, whichever rank and micro-batch they are in.

    The mean is a sum over a count. Counts are added up over ranks before the first forward pass, so that a batch's own
    sum is all that its backward pass needs. A term may have several means (`width`), each with a share of its own.
    """

    # In metrics.jsonl.
    name: str
    weight: float = 1.0
    width: int = 1

    @abstractmethod
    def counts(self, batch: Batch) -> Sequence[int]:
        """What a batch adds to the counts, [width]; it is still on the host."""

    @abstractmethod
    def sums(self, outputs: Outputs, batch: Batch) -> Tensor:
        """What a batch adds to the sums, float32[width], with their gradient."""

    def shares(self, counts: Sequence[int]) -> list[float]:
        """How much each mean counts in the term, [width], given the counts of all ranks."""
        return [1.0] * self.width

    def learn(self, means: Sequence[float], counts: Sequence[int]) -> None:
        """A step has changed the weights; these were its means over all ranks."""
        return

    def numbers(self, means: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
        """What a step's line of metrics.jsonl says of the term."""
        return {self.name: means[0]}

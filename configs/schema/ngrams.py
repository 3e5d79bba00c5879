"""The tower of character n-grams: small, fast, and without a vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from crossguard.configs.errors import UserError
from crossguard.configs.schema.checks import at_least


@dataclass
class NgramsConfig:
    """Logistic regression over the n-grams of the text, whose hashes lead into a table (arXiv 1607.04606), added to
    what is made of the other modalities."""

    # Rows of the table; n-grams whose hashes meet share one.
    buckets: int = 131072
    # Width of the table; more than there are policies adds nothing.
    width: int = 16
    # Characters of the shortest n-grams, the space at each end of a word counted.
    min_n: int = 1
    # Characters of the longest n-grams.
    max_n: int = 5
    # Characters kept of a post's text.
    max_characters: int = 1000

    def __post_init__(self) -> None:
        at_least("model.ngrams.width", self.width, 1)
        at_least("model.ngrams.min_n", self.min_n, 1)
        at_least("model.ngrams.max_characters", self.max_characters, 1)
        if not 1 <= self.buckets < 1 << 31:
            raise UserError(f"model.ngrams.buckets={self.buckets}: a number from 1 to {(1 << 31) - 1}")
        if self.max_n < self.min_n:
            raise UserError(f"model.ngrams.max_n={self.max_n}: must be at least model.ngrams.min_n={self.min_n}")

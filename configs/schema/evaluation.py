"""What is measured, when, and on how much data."""

from __future__ import annotations

from dataclasses import dataclass, field

from crossguard.configs.errors import UserError
from crossguard.configs.schema.checks import at_least, one_of

REFERENCES = ("tfidf_logistic_regression",)


@dataclass
class EvaluationConfig:
    """Evaluation counts known labels only."""

    # Evaluate on the validation split every this many steps; 0 leaves it out.
    every_steps: int = 0
    # At most this many validation posts during training (the final evaluation takes all); by default all.
    max_validation_posts: int | None = None
    # Splits of the final evaluation; by default every one but train.
    splits: list[str] | None = None
    # Posts in a forward pass of a rank.
    batch_size: int = 64
    # A cell (policy, or policy × language) with fewer positives or fewer negatives is reported as insufficient.
    min_positives: int = 10
    # Further metrics of your own, `module:function` with (labels, scores) -> float; reported under the function's name.
    metrics: list[str] = field(default_factory=list)
    # Simple models fitted on the same training split and shown beside: tfidf_logistic_regression.
    references: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        at_least("evaluation.every_steps", self.every_steps, 0)
        at_least("evaluation.max_validation_posts", self.max_validation_posts, 1)
        at_least("evaluation.batch_size", self.batch_size, 1)
        at_least("evaluation.min_positives", self.min_positives, 1)
        for name in self.references:
            one_of("evaluation.references", name, REFERENCES)
        for name in self.metrics:
            if ":" not in name:
                raise UserError(f"evaluation.metrics: '{name}': write module:function")

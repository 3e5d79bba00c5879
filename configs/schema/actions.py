"""What is done with a post, and what each action promises."""

from __future__ import annotations

from dataclasses import dataclass

from crossguard.configs.errors import UserError
from crossguard.configs.schema.checks import above, within

# What is left when no action is taken.
ALLOW = "allow"


@dataclass
class ActionConfig:
    """When an action is taken: a precision, a recall, or two costs."""

    # At least this share of the posts that it is taken on are violating.
    precision: float | None = None
    # It is taken on at least this share of the violating posts.
    recall: float | None = None
    # The probability, over the choice of the validation posts, that precision or recall is missed all the same.
    delta: float = 0.1
    # What it costs to take it on a benign post, in any unit; with the next, in place of a promise.
    false_positive_cost: float | None = None
    # What it costs not to take it on a violating post.
    false_negative_cost: float | None = None

    def __post_init__(self) -> None:
        key = "evaluation.actions.ACTION"
        for name in ("precision", "recall", "delta"):
            value = getattr(self, name)
            within(f"{key}.{name}", value, 0, 1)
            if value in (0, 1):
                raise UserError(f"{key}.{name}={value}: must lie between 0 and 1, both excluded")
        costs = (self.false_positive_cost, self.false_negative_cost)
        for name, cost in zip(("false_positive_cost", "false_negative_cost"), costs, strict=True):
            above(f"{key}.{name}", cost, 0)
        given = [self.precision is not None, self.recall is not None, costs != (None, None)]
        if sum(given) != 1 or (given[2] and None in costs):
            raise UserError(f"{key}: give precision, or recall, or both of false_positive_cost and false_negative_cost")

    @property
    def promise(self) -> str:
        """The target in words."""
        if self.precision is not None:
            return f"precision ≥ {self.precision:g} with probability ≥ {1 - self.delta:g}"
        if self.recall is not None:
            return f"recall ≥ {self.recall:g} with probability ≥ {1 - self.delta:g}"
        return f"least cost at {self.false_positive_cost:g} : {self.false_negative_cost:g}, nothing promised"


# Removing needs to be right; of the rest, people should see most that violates.
DEFAULT_ACTIONS = {"remove": ActionConfig(precision=0.95), "human_review": ActionConfig(recall=0.8)}

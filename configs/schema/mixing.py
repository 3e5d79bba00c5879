"""How much of the training comes from where."""

from __future__ import annotations

from dataclasses import dataclass, field

from crossguard.configs.errors import UserError
from crossguard.configs.schema.checks import at_least

# What the recipe's own posts are called beside further datasets.
OWN = "own"


@dataclass
class WeightChange:
    """Other weights from a step on."""

    # The last step with the weights before.
    after_step: int = 0
    # Dataset -> its weight from then on; all of them are named.
    weights: dict[str, float] = field(default_factory=dict)


@dataclass
class MixingConfig:
    """The share of each dataset, language and policy in training; validation and test stay as they are."""

    # 1 takes the posts as they are, each once an epoch. Above 1, strata (language x rarest policy) are evened out:
    # one of n posts gets a share of n^(1/temperature).
    temperature: float = 1.0
    # No stratum comes more than this many times as often as it would at temperature 1.
    max_repeats: float = 10.0
    # Further shards to train on, beside the recipe's `own`: name -> folder or URL. Their taxonomy is the same.
    datasets: dict[str, str] = field(default_factory=dict)
    # Dataset -> weight, `own` included; by default each weighs as much as it has posts.
    weights: dict[str, float] = field(default_factory=dict)
    # Weights that change while training.
    changes: list[WeightChange] = field(default_factory=list)

    def __post_init__(self) -> None:
        at_least("data.mixing.temperature", self.temperature, 1)
        at_least("data.mixing.max_repeats", self.max_repeats, 1)
        names = {OWN, *self.datasets}
        if OWN in self.datasets:
            raise UserError(f"data.mixing.datasets.{OWN}: that is the name of the recipe's own posts; choose another")
        if self.changes and not self.weights:
            raise UserError("data.mixing.changes: set data.mixing.weights, from which they change")
        if self.weights:
            _check_weights("data.mixing.weights", self.weights, names)
        before = 0
        for number, change in enumerate(self.changes):
            key = f"data.mixing.changes[{number}]"
            if change.after_step <= before:
                raise UserError(f"{key}.after_step={change.after_step}: must be above {before}; changes stand in order")
            before = change.after_step
            _check_weights(f"{key}.weights", change.weights, names)


def _check_weights(key: str, weights: dict[str, float], names: set[str]) -> None:
    if set(weights) != names:
        raise UserError(f"{key}: must name each of {', '.join(sorted(names))}, names {', '.join(sorted(weights))}")
    if min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise UserError(f"{key}: must not be negative, and one must be above 0")

"""Group DRO (arXiv 1911.08731): weights of the languages that follow their losses by exponentiated gradient.

A step is weighted by what the steps before it have taught: so weights are known before its first forward pass, and are
the same on any number of ranks and micro-batches. Among the languages of a step they add up to 1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from crossguard.configs.schema.loss import GroupDroConfig

# A language that is learned well for long keeps this weight, from which it can grow again.
LEAST = 1e-9


class GroupDro:
    """The weights of the languages.

    Args:
        config: step size and adjustment.
        posts: language -> how many posts of it there are.
        weights: those of the step before, which a checkpoint keeps; changed in place. A language that is not among them
            starts with an equal share.
    """

    def __init__(self, config: GroupDroConfig, posts: Mapping[str, int], weights: dict[str, float]):
        self._config, self._posts, self._weights = config, posts, weights
        if weights.keys() != posts.keys():
            kept = {language: weights.get(language, 1 / len(posts)) for language in posts}
            weights.clear()
            weights.update(_normalised(kept))

    def shares(self, present: Collection[str]) -> dict[str, float]:
        """The weights of the languages in `present`, which add up to 1."""
        return _normalised({language: self._weights[language] for language in present})

    def follow(self, losses: Mapping[str, float]) -> None:
        """Grow with the mean losses of a step; a language that it has no known label of is not in `losses`, and its
        weight changes only as all of them add up to 1."""
        grown = {language: math.log(weight) for language, weight in self._weights.items()}
        for language, loss in losses.items():
            adjusted = loss + self._config.adjustment / math.sqrt(self._posts[language])
            grown[language] += self._config.step_size * adjusted
        largest = max(grown.values())  # No power overflows.
        weights = _normalised({language: math.exp(value - largest) for language, value in grown.items()})
        self._weights.update({language: max(weight, LEAST) for language, weight in weights.items()})

    def numbers(self, losses: Mapping[str, float]) -> dict[str, float]:
        """The weighted mean, and every weight."""
        shares = self.shares(losses)
        robust = sum(shares[language] * loss for language, loss in losses.items())
        return {"loss.robust": robust} | {f"group_weight.{name}": weight for name, weight in self._weights.items()}


def _normalised(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {language: weight / total for language, weight in weights.items()}

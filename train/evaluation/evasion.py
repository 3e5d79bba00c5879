"""What disguises cost: recall and benign false positives on disguised texts, at the thresholds of texts as they are.

Every post stands beside its own disguise, so that intervals are paired: posts are drawn anew many times, each pattern
of outcomes over the policies with a Poisson number of copies, which takes no longer for a million posts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from crossguard.configs.schema import EvaluationConfig
from crossguard.train.evaluation.decisions import Decisions
from crossguard.train.evaluation.false_positives import RATE
from crossguard.train.evaluation.intervals import LEVEL, RESAMPLES
from crossguard.train.evaluation.metrics import POSITIVE_FROM
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.splits import VALIDATION

# The operating point that every model has, whatever its actions promise: RATE of the benign posts are flagged.
POINT = "false_positive_rate_5"
RATES = {"recall": True, "false_positive_rate": False}
# Codes of a post for a policy: not counted, else benign or violating, flagged before, flagged after.
COUNTED, VIOLATING, BEFORE, AFTER = 1, 2, 4, 8


def measure_evasion(
    scored: Mapping[str, Predictions],
    split: str,
    disguised: Mapping[str, Predictions],
    decisions: Decisions | None,
    config: EvaluationConfig,
) -> dict[str, Any]:
    """Compare a split with its disguises.

    Args:
        scored: split -> predictions on texts as they are; thresholds of POINT are those of validation, where it is
            among them.
        split: which was disguised.
        disguised: family -> predictions on the same posts.
        decisions: the model's; each of its actions is an operating point too.
        config: `min_positives`.

    Returns:
        {"split", "fitted_on", "families": {family: {point: {"macro": rates, "policies": {policy: {"all": cell,
        "by_language": {language: cell}}}}}}}, where rates are {"recall": rate, "false_positive_rate": rate}, a rate is
        {"clean", "attacked", "difference", "interval"}, the interval that of the difference, and a cell is {"n",
        "positives"} with rates, or {…, "insufficient": True}. Posts without a threshold of the point are not counted.
    """
    fitted_on = VALIDATION if VALIDATION in scored else split
    clean = scored[split]
    points = _points(clean, scored[fitted_on], decisions)
    families: dict[str, Any] = {}
    for family, predictions in disguised.items():
        after = _aligned(predictions, clean.ids)
        found = {name: _compare(clean, after, above, config.min_positives) for name, above in points.items()}
        families[family] = {name: one for name, one in found.items() if one["policies"]}
    return {"split": split, "fitted_on": fitted_on, "families": families}


def _points(clean: Predictions, fitted_on: Predictions, decisions: Decisions | None) -> dict[str, np.ndarray]:
    """Name -> float64[posts, policies]: the score above which a post is flagged; NaN where it has none."""
    points = {POINT: np.tile(_flagging_a_share(fitted_on), (len(clean), 1))}
    languages = np.array(clean.languages, dtype=object)
    if decisions is None:
        return points
    for action in decisions.promises:
        above = np.full(clean.scores.shape, np.nan)
        for column, policy in enumerate(clean.policies):
            for language, thresholds in decisions.thresholds.get(policy, {}).items():
                if (threshold := thresholds[action].above) is not None:
                    above[languages == language, column] = threshold
        points[action] = above
    return points


def _flagging_a_share(predictions: Predictions) -> np.ndarray:
    """float64[policies]: the scores above which RATE of the benign posts lie; NaN without any."""
    found = np.full(len(predictions.policies), np.nan)
    for column in range(len(found)):
        benign = predictions.labels[:, column] < POSITIVE_FROM  # Not so where it is unknown.
        if benign.any():
            found[column] = np.quantile(predictions.scores[benign, column], 1 - RATE, method="higher")
    return found


def _aligned(predictions: Predictions, ids: list[str]) -> np.ndarray:
    """float64[posts, policies]: the scores in the order of `ids`; a post that could not be read again keeps none."""
    places = {post: row for row, post in enumerate(predictions.ids)}
    scores = np.full((len(ids), len(predictions.policies)), np.nan)
    found = [row for row, post in enumerate(ids) if post in places]
    scores[found] = predictions.scores[[places[ids[row]] for row in found]]
    return scores


def _compare(clean: Predictions, after: np.ndarray, above: np.ndarray, least: int) -> dict[str, Any]:
    counted = ~np.isnan(clean.labels) & ~np.isnan(above) & ~np.isnan(after)
    codes = COUNTED + VIOLATING * (clean.labels >= POSITIVE_FROM)
    codes = codes + BEFORE * (clean.scores > above) + AFTER * (after > above)
    codes = np.where(counted, codes, 0)
    everything = _Patterns.of(codes)
    measured = [column for column in range(len(clean.policies)) if counted[:, column].any()]
    languages = np.array(clean.languages, dtype=object)
    by_language = {name: _Patterns.of(codes[languages == name]) for name in sorted(set(clean.languages))}
    policies = {
        clean.policies[column]: {
            "all": everything.cell(column, least),
            "by_language": {
                name: patterns.cell(column, least) for name, patterns in by_language.items() if patterns.has(column)
            },
        }
        for column in measured
    }
    enough = [column for column in measured if "insufficient" not in policies[clean.policies[column]]["all"]]
    return {"policies": policies} | ({"macro": everything.rates(enough)} if enough else {})


@dataclass(frozen=True)
class _Patterns:
    """The outcomes of posts over all policies, each pattern once."""

    # int[patterns, policies]
    codes: np.ndarray
    # float64[1 + RESAMPLES, patterns]: how many posts have it, in the sample itself and in those drawn from it.
    copies: np.ndarray

    @classmethod
    def of(cls, codes: np.ndarray) -> _Patterns:
        patterns, counts = np.unique(codes, axis=0, return_counts=True)
        drawn = np.random.default_rng(len(codes)).poisson(counts, (RESAMPLES, len(counts)))
        return cls(patterns, np.vstack([counts, drawn]).astype(np.float64))

    def has(self, column: int) -> bool:
        """Whether any post counts for the policy."""
        return bool(self.codes[:, column].any())

    def cell(self, column: int, least: int) -> dict[str, Any]:
        """What is said of one policy."""
        code = self.codes[:, column]
        n, positives = (int(self.copies[0] @ (code & bit > 0)) for bit in (COUNTED, VIOLATING))
        counts = {"n": n, "positives": positives}
        if min(positives, n - positives) < least:
            return counts | {"insufficient": True}
        return counts | self.rates([column])

    def rates(self, columns: list[int]) -> dict[str, Any]:
        """The means over policies of recall and false positive rate, before and after."""
        codes = self.codes[:, columns]
        found = {}
        for name, violating in RATES.items():
            kind = (codes & COUNTED > 0) & ((codes & VIOLATING > 0) == violating)
            with np.errstate(invalid="ignore"):  # A draw may have none of the kind.
                before, after = (
                    (self.copies @ (kind & (codes & bit > 0)) / (self.copies @ kind)).mean(axis=1)
                    for bit in (BEFORE, AFTER)
                )
            drawn = (after - before)[1:]
            ends = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
            difference = float(after[0] - before[0])
            found[name] = {"clean": float(before[0]), "attacked": float(after[0]), "difference": difference}
            found[name]["interval"] = ends
        return found

"""Thresholds with a guarantee: from labels to a score above which an action is taken, or to no threshold at all.

A threshold that reaches a precision on the posts it was chosen on breaks its promise on others about every second time.
Here it is found by testing (Learn then Test; Angelopoulos et al., 2021, arXiv 2110.01052): among the r posts with the
highest scores, violations are binomial, which bounds the precision above the next score. Larger and larger r are tested
in turn, each at the full level, until one fails (fixed-sequence testing), which keeps the chance of a broken promise at
delta as long as precision does not rise while the threshold falls. Only those r are tested at which another benign post
is forgiven. Where the tests begin is decided by the posts that rank below alone, so that it leaves the chance as it is.

Of normal scores, 10 to 30 % violating, whose recall at precision .9 is .06 to .84 with the best threshold, a promise of
.9 at delta .1 costs .20 of recall on average (.34 at most) with 100 violating labels, .09 (.15) with 400 and .04 (.07)
with 2,000. Tests that begin where one would begin who knew the truth cost as much: it is the price of the guarantee.
Bounds that hold at all thresholds at once, and several beginnings that share delta, cost more.

Recall needs one test alone, since the number of violations below their j-th lowest score decides it (a tolerance limit;
Wilks, 1941).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from crossguard.configs.schema.evaluation import ActionConfig

# Each test takes this many times as many posts as the one before, and at least one more.
STEP = 1.02
# The first takes at most the geometric mean of the least that can show anything and this share of the violations that
# rank below it. Of a model with fewer above its threshold nothing can be promised; earlier, luck would decide.
BELOW = 0.5


@dataclass(frozen=True)
class Threshold:
    """Where an action begins, or why it cannot."""

    # The action is taken above this score (as the model gives it); None: never.
    above: float | None
    # Why there is none.
    abstains: str | None = None
    # What was seen on the labels that it was chosen on.
    flagged: int | None = None
    precision: float | None = None
    recall: float | None = None
    # What holds with probability 1 - delta: the bound of the precision or recall.
    at_least: float | None = None
    # The calibrated probability of a violation there.
    probability: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without those that are None but `above`."""
        return {name: value for name, value in asdict(self).items() if value is not None or name == "above"}


def find_threshold(
    labels: np.ndarray, scores: np.ndarray, action: ActionConfig, calibrated: np.ndarray | None = None
) -> Threshold:
    """The lowest threshold that keeps what the action promises.

    Args:
        labels: int[n], 1 and 0, on posts that no training has seen.
        scores: float[n]
        action: its target.
        calibrated: float[n], probabilities in the order of the scores; an expected cost needs them.
    """
    if action.precision is not None:
        return precision_threshold(labels, scores, action.precision, action.delta)
    if action.recall is not None:
        return recall_threshold(labels, scores, action.recall, action.delta)
    assert action.false_positive_cost is not None
    assert action.false_negative_cost is not None
    probability = action.false_positive_cost / (action.false_positive_cost + action.false_negative_cost)
    return cost_threshold(labels, scores, scores if calibrated is None else calibrated, probability)


def precision_threshold(labels: np.ndarray, scores: np.ndarray, target: float, delta: float) -> Threshold:
    """The lowest threshold whose precision is at least `target` with probability 1 - `delta`."""
    from scipy.stats import beta

    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(labels[order])
    # So many posts, all of them violating, are the least that can show it.
    least = math.ceil(math.log(delta) / math.log(target))
    tested, forgiven = _tests(scores, least, target, delta)
    if labels.sum() < least:
        return Threshold(None, f"{labels.sum()} violating posts; {least} are the least")
    if not len(tested):
        return Threshold(None, f"{len(labels)} labels; {least + 1} with scores that differ are the least")
    begin = _begin(tested, hits[-1] - hits[tested - 1], least)
    tested, forgiven = tested[begin:], forgiven[begin:]
    fails = np.flatnonzero(tested - hits[tested - 1] > forgiven)
    passed = tested[: fails[0]] if len(fails) else tested
    if not len(passed):
        first = tested[0]
        return Threshold(None, f"of the {first} posts with the highest scores {hits[first - 1]} are violating")
    count = int(passed[-1])
    found = int(hits[count - 1])
    bound = float(beta.ppf(delta, found, count - found + 1))
    return Threshold(float(scores[count]), None, count, found / count, found / int(hits[-1]), bound)


def recall_threshold(labels: np.ndarray, scores: np.ndarray, target: float, delta: float) -> Threshold:
    """The highest threshold whose recall is at least `target` with probability 1 - `delta`."""
    from scipy.stats import beta, binom

    violating = np.sort(scores[labels == 1])
    count = len(violating)
    # The number of violations that may stay below: so many that more than 1 - target do with probability delta alone.
    below = int(np.searchsorted(-binom.sf(np.arange(count), count, 1 - target), -(1 - delta), side="right"))
    if below == 0:
        least = math.ceil(math.log(delta) / math.log(target))
        return Threshold(None, f"{count} violating posts; {least} are the least")
    above = float(np.nextafter(violating[below - 1], -np.inf))
    flagged = scores > above
    found = int(labels[flagged].sum())
    bound = 1 - float(beta.ppf(1 - delta, below, count - below + 1))
    return Threshold(above, None, int(flagged.sum()), found / int(flagged.sum()), found / count, bound)


def cost_threshold(labels: np.ndarray, scores: np.ndarray, calibrated: np.ndarray, probability: float) -> Threshold:
    """The score above which acting is expected to cost less than not acting; it promises nothing."""
    if not labels.any() or labels.all():
        return Threshold(None, "no violating posts" if not labels.any() else "no benign posts")
    below = scores[calibrated < probability]
    above = float(below.max()) if len(below) else float(np.nextafter(scores.min(), -np.inf))
    flagged = scores > above
    hits, count = int(labels[flagged].sum()), int(flagged.sum())
    return Threshold(above, None, count, hits / count if count else None, hits / int(labels.sum()))


def _tests(scores: np.ndarray, least: int, target: float, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """(int[…], int[…]): how many posts each test takes, and how many benign ones among them it forgives.

    After each the score falls. One that takes more posts than another and forgives no more is only harder to pass.
    """
    from scipy.stats import binom

    counts, count = [], float(least)
    while count < len(scores):
        counts.append(int(count))
        count = max(count + 1, count * STEP)
    tested = np.array(counts, dtype=np.int64)
    tested = tested[scores[tested - 1] > scores[tested]] if len(tested) else tested
    forgiven = binom.ppf(delta, tested, 1 - target).astype(np.int64) - 1
    useful = np.diff(forgiven, prepend=-1) > 0
    return tested[useful], forgiven[useful]


def _begin(tested: np.ndarray, below: np.ndarray, least: int) -> int:
    """Which test is the first one.

    Args:
        tested: int[…], posts of each.
        below: int[…], violations that rank below those.
        least: posts that can show anything.
    """
    return max(0, int((tested**2 <= least * BELOW * below).sum()) - 1)

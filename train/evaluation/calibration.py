"""Calibration: from a score to the probability that a post violates a policy, in its language.

A language's map is logit -> slope · logit + intercept, drawn towards that of the whole policy the more, the fewer
labels the language has (a Gaussian prior, so that a language without labels gets the policy's map). How strongly is
weighed for each language by cross-validation and by what the other languages need (empirical Bayes), so that one that
is far off does not loosen all others. The kind of map is chosen by cross-validation, too: temperature (a slope alone;
Guo et al., 2017, arXiv 1706.04599), Platt scaling (1999), or isotonic regression of the policy on top of the languages'
maps (Zadrozny and Elkan, 2002). Sampling that made violations commoner in training than they are is undone before
anything is fitted (see `sampling_prior`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

METHODS = ("temperature", "platt", "isotonic")
# Precisions of the prior on a language's difference from its policy, in units of a logit; infinite: all are alike.
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0, np.inf)
# The policy's own map is drawn a little towards the scores as they are: with few positives it must not run away.
POLICY_STRENGTH = 1.0
# As if so many more languages were exactly like their policy: among few languages, few labels prove no difference.
# Twenty labels then cost .0003 of log loss, against the policy's map, where languages are alike (.003 with 0); where
# others differ and this one does not, .004 (.008); where it is off by 1.6 logits they gain .028 (.032).
LIKE_POLICY = 4.0
FOLDS = 5
FARTHEST = 30.0
# A more complex map must do better by this much of the log loss.
WORTH = 1e-3
LEAST_WEIGHT = 1e-3
Line = tuple[float, float]
# Language -> the weight of each of STRENGTHS.
Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Calibrator:
    """The map of one policy."""

    method: str
    # The map of the policy: of languages that have none of their own.
    policy: Line
    languages: dict[str, Line] = field(default_factory=dict)
    # What is subtracted from the logits of a language to undo the sampling of training.
    shifts: dict[str, float] = field(default_factory=dict)
    # Isotonic regression on top: probabilities in, probabilities out; empty without.
    knots: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())

    def __call__(self, scores: np.ndarray, languages: np.ndarray) -> np.ndarray:
        """float64[n]: calibrated probabilities; in each language their order is that of the scores."""
        lines = np.array([self.languages.get(language, self.policy) for language in languages]).reshape(-1, 2)
        shifts = np.array([self.shifts.get(language, 0.0) for language in languages])
        found = sigmoid(lines[:, 0] * (logits(scores) - shifts) + lines[:, 1])
        return np.interp(found, *self.knots) if self.knots[0] else found

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "method": self.method,
            "policy": list(self.policy),
            "languages": {language: list(line) for language, line in self.languages.items()},
            "shifts": self.shifts,
            "knots": [list(values) for values in self.knots],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Calibrator:
        """The calibrator that `to_json` wrote."""
        return cls(
            value["method"],
            (value["policy"][0], value["policy"][1]),
            {language: (line[0], line[1]) for language, line in value["languages"].items()},
            dict(value["shifts"]),
            (tuple(value["knots"][0]), tuple(value["knots"][1])),
        )


def fit_calibrator(
    labels: np.ndarray, scores: np.ndarray, languages: np.ndarray, shifts: Mapping[str, float], method: str = "auto"
) -> Calibrator:
    """Fit one policy on known labels.

    Args:
        labels: int[n], 1 and 0, each at least once.
        scores: float[n], in [0, 1].
        languages: object[n].
        shifts: of languages' logits, to be subtracted first.
        method: one of METHODS, or auto for the one with the least log loss on posts that it was not fitted on.
    """
    posts = _Posts.of(labels, scores, languages, shifts)
    folds = _folds(labels, languages)
    chosen: dict[str, tuple[float, Weights]] = {}
    for kind in METHODS if method == "auto" else (method,):
        losses = np.array([_cross_validated(posts, folds, kind, strength) for strength in range(len(STRENGTHS))])
        likelihood, weights = _weigh_strengths(losses)
        chosen[kind] = -likelihood / len(labels), dict(zip(posts.rows, weights.T, strict=True))
    # In the order of their freedom: the first that is about as good as the best.
    good = (1 + WORTH) * min(loss for loss, _ in chosen.values())
    kind, (_, best) = next((kind, one) for kind, one in chosen.items() if one[0] <= good)
    return _fit(posts, np.ones(len(labels), dtype=bool), kind, best, dict(shifts))


def logits(scores: np.ndarray) -> np.ndarray:
    """The logits of probabilities; those of 0 and 1 are finite."""
    with np.errstate(divide="ignore"):
        return np.clip(np.log(scores) - np.log1p(-scores), -FARTHEST, FARTHEST)


def sigmoid(values: np.ndarray) -> np.ndarray:
    """Probabilities of logits."""
    return 1 / (1 + np.exp(-np.clip(values, -500, 500)))


@dataclass(frozen=True)
class _Posts:
    labels: np.ndarray
    scores: np.ndarray
    languages: np.ndarray
    # Shifted, float64[n].
    logits: np.ndarray
    # Language -> bool[n].
    rows: dict[str, np.ndarray]
    # Where logits lie and how wide they spread: the prior speaks of the map there, not at a logit of 0.
    centre: float
    width: float

    @classmethod
    def of(cls, labels: np.ndarray, scores: np.ndarray, languages: np.ndarray, shifts: Mapping[str, float]) -> _Posts:
        values = logits(scores) - np.array([shifts.get(language, 0.0) for language in languages])
        rows = {str(language): languages == language for language in sorted(set(languages))}
        return cls(labels, scores, languages, values, rows, float(values.mean()), float(values.std()) or 1.0)


def _fit(posts: _Posts, chosen: np.ndarray, kind: str, weights: Weights, shifts: dict[str, float]) -> Calibrator:
    """Fit on the chosen rows; a language's line is the mean of those under each strength."""

    def line(rows: np.ndarray, prior: Line, precision: float) -> Line:
        return _fit_line(posts.logits[rows], posts.labels[rows], prior, precision, posts, kind != "temperature")

    policy = line(chosen, (1.0, 0.0), POLICY_STRENGTH)
    languages = {}
    for language, own in posts.rows.items():
        rows, weight = own & chosen, weights[language]
        if rows.any() and weight[-1] < 1:
            used = np.flatnonzero(weight > LEAST_WEIGHT)
            lines = [line(rows, policy, STRENGTHS[one]) if np.isfinite(STRENGTHS[one]) else policy for one in used]
            slope, intercept = np.average(lines, axis=0, weights=weight[used])
            languages[language] = float(slope), float(intercept)
    calibrator = Calibrator(kind, policy, languages, shifts)
    return calibrator if kind != "isotonic" else _with_isotonic(calibrator, posts, chosen)


def _with_isotonic(calibrator: Calibrator, posts: _Posts, chosen: np.ndarray) -> Calibrator:
    from sklearn.isotonic import IsotonicRegression

    before = calibrator(posts.scores[chosen], posts.languages[chosen])
    # A little away from 0 and 1, which no number of labels can show.
    least = 1 / (chosen.sum() + 2)
    isotonic = IsotonicRegression(y_min=least, y_max=1 - least).fit(before, posts.labels[chosen])
    knots = tuple(isotonic.X_thresholds_.tolist()), tuple(isotonic.y_thresholds_.tolist())
    return replace(calibrator, knots=knots)


def _fit_line(
    values: np.ndarray, labels: np.ndarray, prior: Line, precision: float, posts: _Posts, with_intercept: bool
) -> Line:
    """The most probable (slope, intercept) under a Gaussian prior around another line, by Newton's method.

    A slope below 0 would turn the order of posts around: it is held at 0.
    """
    # In coordinates in which the prior is round: the logit at the centre, and its change over a width.
    x = np.stack([(values - posts.centre) / posts.width, np.ones_like(values)], axis=1)
    mean = np.array([prior[0] * posts.width, prior[1] + prior[0] * posts.centre])
    if not with_intercept:  # the line through logit 0 alone
        x = values[:, None] / posts.width
        mean = mean[:1]
    weights = mean.copy()
    free = np.ones(len(weights), dtype=bool)
    for _ in range(50):
        chance = sigmoid(x @ weights)
        gradient = x.T @ (chance - labels) + precision * (weights - mean)
        curvature = (x * (chance * (1 - chance))[:, None]).T @ x + precision * np.eye(len(weights))
        step = np.zeros_like(weights)
        step[free] = np.linalg.solve(curvature[np.ix_(free, free)], gradient[free])
        weights = weights - np.clip(step, -2, 2)
        if weights[0] < 0:
            weights[0], free[0] = 0.0, False
        if np.abs(step).max() < 1e-8:
            break
    slope = float(weights[0] / posts.width)
    return (slope, float(weights[1]) - slope * posts.centre) if with_intercept else (slope, 0.0)


def _folds(labels: np.ndarray, languages: np.ndarray) -> np.ndarray:
    """int[n]: a fold for each post, even over languages and labels."""
    shuffled = np.random.default_rng(0).permutation(len(labels))
    order = shuffled[np.lexsort((labels[shuffled], languages[shuffled].astype(str)))]
    folds = np.empty(len(labels), dtype=np.int64)
    folds[order] = np.arange(len(labels)) % FOLDS
    return folds


def _cross_validated(posts: _Posts, folds: np.ndarray, kind: str, strength: int) -> np.ndarray:
    """float64[languages]: log loss of each language's posts under maps that were fitted on the other folds."""
    weights = dict.fromkeys(posts.rows, np.eye(len(STRENGTHS))[strength])
    losses = np.zeros(len(posts.labels))
    for fold in range(FOLDS):
        held_out = folds == fold
        if not held_out.any() or len(set(posts.labels[~held_out])) < 2:
            continue
        calibrator = _fit(posts, ~held_out, kind, weights, {})
        # The logits of the posts are shifted already.
        found = calibrator(sigmoid(posts.logits[held_out]), posts.languages[held_out])
        found = np.clip(found, 1e-12, 1 - 1e-12)
        labels = posts.labels[held_out]
        losses[held_out] = -(labels * np.log(found) + (1 - labels) * np.log1p(-found))
    return np.array([losses[rows].sum() for rows in posts.rows.values()])


def _weigh_strengths(losses: np.ndarray) -> tuple[float, np.ndarray]:
    """The log likelihood of held-out posts, and float64[strengths, languages]: how likely each language has each
    strength, from their losses [strengths, languages].

    How common each strength is among languages is estimated from all of them, by expectation maximisation.
    """
    # As if there were one more language that had each strength in part.
    supposed = np.full(len(STRENGTHS), 1 / len(STRENGTHS))
    supposed[-1] += LIKE_POLICY
    prior = supposed / supposed.sum()
    for _ in range(20):
        joint = np.log(prior)[:, None] - losses
        top = joint.max(axis=0)
        weights = np.exp(joint - top)
        likelihood = float((top + np.log(weights.sum(axis=0))).sum())
        weights /= weights.sum(axis=0)
        prior = (weights.sum(axis=1) + supposed) / (weights.shape[1] + supposed.sum())
    return likelihood, weights

"""From scores to decisions: calibrated probabilities and actions for each policy and language, fitted on validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from crossguard.configs.schema import EvaluationConfig
from crossguard.configs.schema.actions import ALLOW, ActionConfig
from crossguard.data.taxonomy import hold_parents
from crossguard.train.evaluation.calibration import Calibrator, fit_calibrator
from crossguard.train.evaluation.metrics import Known
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.sampling_prior import Shifts
from crossguard.train.evaluation.thresholds import Threshold, find_threshold

# What is said where a language has no labels of a policy at all.
NO_LABELS = "no labels"


@dataclass(frozen=True)
class Decisions:
    """What turns the scores of one model into probabilities and actions."""

    # Policies without one keep their scores: they have too few labels.
    calibrators: dict[str, Calibrator]
    # Policy -> language -> action -> threshold, the most severe action first.
    thresholds: dict[str, dict[str, dict[str, Threshold]]]
    # Action -> what it promises, in words.
    promises: dict[str, str]
    # (child, parent) of policies, every parent before its own children.
    parents: list[tuple[str, str]] = field(default_factory=list)

    def calibrated(self, predictions: Predictions) -> np.ndarray:
        """float64[posts, policies]: probabilities, each at most its parent's; scores where there is no calibrator."""
        languages = np.array(predictions.languages, dtype=object)
        found = predictions.scores.copy()
        for column, policy in enumerate(predictions.policies):
            if policy in self.calibrators:
                found[:, column] = self.calibrators[policy](predictions.scores[:, column], languages)
        return hold_parents(found, predictions.policies, self.parents)

    def actions(self, predictions: Predictions) -> np.ndarray:
        """object[posts, policies]: the first action whose threshold the score passes, else `allow`.

        None where no action is reached and the last, mildest one has no threshold: then nothing says that it is benign.
        """
        languages = np.array(predictions.languages, dtype=object)
        found = np.full(predictions.scores.shape, None, dtype=object)
        for column, policy in enumerate(predictions.policies):
            for language, thresholds in self.thresholds.get(policy, {}).items():
                rows = np.flatnonzero(languages == language)
                scores = predictions.scores[rows, column]
                taken = list(thresholds.items())
                if taken and taken[-1][1].above is not None:
                    found[rows, column] = ALLOW
                for name, threshold in reversed(taken):
                    if threshold.above is not None:
                        found[rows[scores > threshold.above], column] = name
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "promises": self.promises,
            **({"parents": [list(pair) for pair in self.parents]} if self.parents else {}),
            "calibration": {policy: calibrator.to_json() for policy, calibrator in self.calibrators.items()},
            "thresholds": {
                policy: {
                    language: {name: threshold.to_json() for name, threshold in actions.items()}
                    for language, actions in languages.items()
                }
                for policy, languages in self.thresholds.items()
            },
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Decisions:
        """What `to_json` wrote."""
        return cls(
            {policy: Calibrator.from_json(one) for policy, one in value["calibration"].items()},
            {
                policy: {
                    language: {name: Threshold(**threshold) for name, threshold in actions.items()}
                    for language, actions in languages.items()
                }
                for policy, languages in value["thresholds"].items()
            },
            dict(value["promises"]),
            [(child, parent) for child, parent in value.get("parents", [])],
        )


def fit_decisions(
    validation: Predictions,
    config: EvaluationConfig,
    shifts: Shifts,
    parents: Sequence[tuple[str, str]] = (),
) -> Decisions:
    """Fit calibrators and thresholds on a split that no training has seen.

    A policy with fewer positives or negatives than `min_positives` gets no calibrator; an action that the labels of a
    language cannot support gets no threshold there.
    """
    calibrators: dict[str, Calibrator] = {}
    thresholds: dict[str, dict[str, dict[str, Threshold]]] = {}
    targets = config.targets
    for policy in validation.policies:
        known = Known.of(validation, policy)
        fewest = min(known.labels.sum(), (1 - known.labels).sum())
        if config.calibration != "none" and fewest >= config.min_positives:
            calibrators[policy] = fit_calibrator(
                known.labels, known.scores, known.languages, shifts.get(policy, {}), config.calibration
            )
        thresholds[policy] = {
            language: _thresholds(known, known.languages == language, targets, calibrators.get(policy))
            for language in sorted(set(validation.languages))
        }
    return Decisions(calibrators, thresholds, {name: action.promise for name, action in targets.items()}, list(parents))


def _thresholds(
    known: Known, rows: np.ndarray, targets: Mapping[str, ActionConfig], calibrator: Calibrator | None
) -> dict[str, Threshold]:
    labels, scores = known.labels[rows], known.scores[rows]
    if not len(labels):
        return {name: Threshold(None, NO_LABELS) for name in targets}
    spoken = known.languages[rows]
    calibrated = None if calibrator is None else calibrator(scores, spoken)
    found = {name: find_threshold(labels, scores, action, calibrated) for name, action in targets.items()}
    if calibrator is not None:
        for name, threshold in found.items():
            if threshold.above is not None:
                probability = float(calibrator(np.array([threshold.above]), spoken[:1])[0])
                found[name] = replace(threshold, probability=probability)
    return found

"""Metrics per policy and per policy × language, over known labels alone.

Everything is computed in float64 from the scores as written, by scikit-learn. A post whose label for a policy is
unknown takes no part in that policy's numbers: neither its score nor its presence can change one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from crossguard.configs.errors import UserError
from crossguard.configs.own_parts import load_own, naming
from crossguard.configs.schema.evaluation import COUNTS, EvaluationConfig
from crossguard.train.evaluation.predictions import Predictions

# Called with binary labels int64 [n] and scores float64 [n].
Metric = Callable[[np.ndarray, np.ndarray], float]

POSITIVE_FROM = 0.5
TARGET_PRECISION = 0.9


def evaluate_predictions(predictions: Predictions, config: EvaluationConfig) -> dict[str, Any]:
    """Measure one split.

    Returns:
        `{"policies": {policy: {"all": cell, "by_language": {language: cell}}}, "macro": means, "macro_policy_language":
        means}`, where a cell is `{"n", "positives", metric: value, …}` or `{"n", "positives", "insufficient": True}`.
        A mean over nothing is absent.

    Raises:
        UserError: a metric of the user's own cannot be loaded or gave something else than a finite number.
    """
    metrics = metrics_of(config)
    languages = np.array(predictions.languages, dtype=object)
    policies: dict[str, Any] = {}
    for column, policy in enumerate(predictions.policies):
        labels = predictions.labels[:, column]
        known = ~np.isnan(labels)
        positive = (labels[known] >= POSITIVE_FROM).astype(np.int64)
        scores = predictions.scores[known, column].astype(np.float64)
        spoken = languages[known]
        policies[policy] = {
            "all": _cell(positive, scores, metrics, config.min_positives),
            "by_language": {
                language: _cell(positive[spoken == language], scores[spoken == language], metrics, config.min_positives)
                for language in sorted(set(spoken))
            },
        }
    result: dict[str, Any] = {"policies": policies}
    means = {
        "macro": mean_of_cells(policy["all"] for policy in policies.values()),
        "macro_policy_language": mean_of_cells(
            cell for policy in policies.values() for cell in policy["by_language"].values()
        ),
    }
    return result | {name: mean for name, mean in means.items() if mean}


def metrics_of(config: EvaluationConfig) -> dict[str, Metric]:
    """The built-in metrics and the user's own, by the name that metrics.json gives them."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    metrics: dict[str, Metric] = {
        "average_precision": average_precision_score,
        "auroc": roc_auc_score,
        "recall_at_precision_90": recall_at_precision,
    }
    for number, spec in enumerate(config.metrics):
        key = f"evaluation.metrics[{number}]"
        metrics[spec.partition(":")[2]] = naming(load_own(spec, key), f"{key}={spec}")
    return metrics


def recall_at_precision(labels: np.ndarray, scores: np.ndarray, precision: float = TARGET_PRECISION) -> float:
    """The largest recall of any threshold whose precision is at least `precision`; 0 when none has it."""
    from sklearn.metrics import precision_recall_curve

    precisions, recalls, _ = precision_recall_curve(labels, scores)
    return float(recalls[precisions >= precision].max())


def mean_of_cells(cells: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The unweighted mean of every metric over the cells that have it; insufficient cells have none."""
    measured = [cell for cell in cells if "insufficient" not in cell]
    names = [name for name in measured[0] if name not in COUNTS] if measured else []
    return {name: math.fsum(cell[name] for cell in measured) / len(measured) for name in names}


def _cell(labels: np.ndarray, scores: np.ndarray, metrics: Mapping[str, Metric], min_positives: int) -> dict[str, Any]:
    positives = int(labels.sum())
    counts = {"n": len(labels), "positives": positives}
    if min(positives, len(labels) - positives) < min_positives:
        return counts | {"insufficient": True}
    return counts | {name: _finite(name, metric(labels, scores)) for name, metric in metrics.items()}


def _finite(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"evaluation.metrics: '{name}' returned {value!r}; it must return a finite number")
    return number

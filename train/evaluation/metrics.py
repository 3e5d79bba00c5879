"""Metrics per policy, per policy × language and per slice, over known labels alone.

Everything is computed in float64 from the scores as written, by scikit-learn. A post whose label for a policy is
unknown takes no part in that policy's numbers: neither its score nor its presence can change one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from crossguard.configs.errors import UserError
from crossguard.configs.own_parts import load_own, naming
from crossguard.configs.schema.evaluation import COUNTS, METRICS, EvaluationConfig
from crossguard.data.taxonomy import POSITIVE_FROM
from crossguard.train.evaluation.false_positives import false_positive_gaps
from crossguard.train.evaluation.intervals import ranking_intervals
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.severity import measure_severity
from crossguard.train.evaluation.slices import JOIN, LANGUAGE, groups_of

# Called with binary labels int64 [n] and scores float64 [n].
Metric = Callable[[np.ndarray, np.ndarray], float]

TARGET_PRECISION = 0.9


@dataclass(frozen=True)
class Known:
    """The known labels of one policy."""

    # int64[n], 1 and 0.
    labels: np.ndarray
    # float64[n]
    scores: np.ndarray
    # Language of each post, object[n].
    languages: np.ndarray
    # Slice -> group of each post, object[n].
    slices: dict[str, np.ndarray]

    @classmethod
    def of(cls, predictions: Predictions, policy: str, slices: Iterable[str] = ()) -> Known:
        """The posts whose label for a policy is known; from .5 it is positive."""
        column = predictions.policies.index(policy)
        known = ~np.isnan(predictions.labels[:, column])
        languages = np.array(predictions.languages, dtype=object)
        groups = groups_of(slices, languages, predictions.fields)
        return cls(
            (predictions.labels[known, column] >= POSITIVE_FROM).astype(np.int64),
            predictions.scores[known, column].astype(np.float64),
            languages[known],
            {name: values[known] for name, values in groups.items()},
        )


def evaluate_predictions(
    predictions: Predictions, config: EvaluationConfig, *, in_detail: bool = False
) -> dict[str, Any]:
    """Measure one split.

    Args:
        predictions: its scores and labels.
        config: what to measure.
        in_detail: also slices, intervals, the worst group and gaps of false positives.

    Returns:
        `{"policies": {policy: {"all": cell, "by_language": {language: cell}}}, "macro": means, "macro_policy_language":
        means}`, where a cell is `{"n", "positives", metric: value, …}` or `{"n", "positives", "insufficient": True}`.
        A mean over nothing is absent. Policies with a severity have "severity" (`measure_severity`). In detail, cells
        have "intervals" ({metric: [low, high]}), policies "by_slice" ({slice: {group: cell}}) and "false_positive_gap",
        and beside the means stands "worst" ({metric: its group}).

    Raises:
        UserError: a metric of the user's own cannot be loaded or gave something else than a finite number.
    """
    metrics = metrics_of(config)
    policies: dict[str, Any] = {}
    for policy in predictions.policies:
        known = Known.of(predictions, policy, config.slices if in_detail else ())

        def cell(rows: np.ndarray, known: Known = known) -> dict[str, Any]:
            return _cell(known.labels[rows], known.scores[rows], metrics, config.min_positives, in_detail)

        policies[policy] = {
            "all": cell(np.ones(len(known.labels), dtype=bool)),
            "by_language": _by_group(known.languages, cell),
        }
        if in_detail:
            policies[policy] |= _detail(known, cell, config.min_positives)
    for policy in predictions.severity:
        severity = measure_severity(predictions, policy, config.min_positives, intervals=in_detail)
        policies[policy]["severity"] = severity
    return {"policies": policies, **_means(policies, in_detail)}


def _means(policies: Mapping[str, Any], in_detail: bool) -> dict[str, Any]:
    """What stands beside the policies; a mean over nothing is absent."""
    means = {
        "macro": mean_of_cells(policy["all"] for policy in policies.values()),
        "macro_policy_language": mean_of_cells(
            cell for policy in policies.values() for cell in policy["by_language"].values()
        ),
    }
    if in_detail:
        means["worst"] = worst_groups(policies)
    return {name: mean for name, mean in means.items() if mean}


def _detail(known: Known, cell: Callable[[np.ndarray], dict[str, Any]], min_positives: int) -> dict[str, Any]:
    """Slices, and gaps of false positives between their groups, of one policy."""
    by_slice = {name: _by_group(groups, cell) for name, groups in known.slices.items()}
    simple = {name: groups for name, groups in known.slices.items() if JOIN not in name}
    gaps = false_positive_gaps(known.labels, known.scores, {LANGUAGE: known.languages, **simple}, min_positives)
    return {name: value for name, value in (("by_slice", by_slice), ("false_positive_gap", gaps)) if value}


def groups_in(policy: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(slice, group, cell) of everything below a policy's `all`."""
    for name, cells in {LANGUAGE: policy["by_language"], **policy.get("by_slice", {})}.items():
        for group, cell in cells.items():
            yield name, group, cell


def worst_groups(policies: Mapping[str, Any]) -> dict[str, Any]:
    """For each built-in metric the group with the lowest value: {"policy", "slice", "group", "value", "n", …}."""
    worst: dict[str, Any] = {}
    for policy, measured in policies.items():
        for name, group, cell in groups_in(measured):
            for metric in METRICS:
                if metric in cell and cell[metric] < worst.get(metric, {"value": math.inf})["value"]:
                    place = {"policy": policy, "slice": name, "group": group, "value": cell[metric]}
                    intervals = cell.get("intervals", {})
                    interval = {"interval": intervals[metric]} if metric in intervals else {}
                    worst[metric] = place | interval | {"n": cell["n"], "positives": cell["positives"]}
    return worst


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


def _by_group(groups: np.ndarray, cell: Callable[[np.ndarray], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {str(group): cell(groups == group) for group in sorted(set(groups))}


def _cell(
    labels: np.ndarray, scores: np.ndarray, metrics: Mapping[str, Metric], min_positives: int, intervals: bool
) -> dict[str, Any]:
    positives = int(labels.sum())
    counts = {"n": len(labels), "positives": positives}
    if min(positives, len(labels) - positives) < min_positives:
        return counts | {"insufficient": True}
    cell: dict[str, Any] = counts | {name: _finite(name, metric(labels, scores)) for name, metric in metrics.items()}
    if intervals:
        found = ranking_intervals(labels, scores, TARGET_PRECISION, seed=len(labels))
        cell["intervals"] = {name: list(interval) for name, interval in found.items()}
    return cell


def _finite(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"evaluation.metrics: '{name}' returned {value!r}; it must return a finite number")
    return number

"""Routing: what the whole system reaches when people look at some posts and the model decides the rest.

A review budget is the share of posts sent to people, who are taken to be right. Which posts are worth their time is
measured, not assumed: those with the highest scores, those the model is least sure of, or those whose automatic
decision is expected to cost most. A cascade lets a cheap model drop posts before the costly one sees them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from crossguard.configs.schema import EvaluationConfig
from crossguard.train.evaluation.metrics import Known
from crossguard.train.evaluation.predictions import Predictions

BUDGETS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
ORDERS = ("score", "uncertainty", "cost")


def review_curves(
    labels: np.ndarray, probabilities: np.ndarray, false_positive_cost: float, false_negative_cost: float
) -> dict[str, Any]:
    """The system's recall, precision and cost against the share of posts that people see.

    Args:
        labels: int[n], 1 and 0, n ≥ 1.
        probabilities: float[n], calibrated.
        false_positive_cost, false_negative_cost: of a wrong automatic decision; the one that is expected to cost less
            is taken.

    Returns:
        {"budgets": […], "orders": {order: {"recall": […], "precision": […], "cost": […]}}, "best": order}, the best
        being the one with the least mean cost over the budgets; cost is per post. Precision is None where nothing is
        acted on.
    """
    expected = np.stack([(1 - probabilities) * false_positive_cost, probabilities * false_negative_cost])
    acts = expected[0] < expected[1]
    ranks = {"score": probabilities, "uncertainty": -np.abs(probabilities - 0.5), "cost": expected.min(axis=0)}
    orders: dict[str, dict[str, list[Any]]] = {}
    for name in ORDERS:
        order = np.argsort(-ranks[name], kind="stable")
        points = [_reviewed(labels[order], acts[order], round(share * len(labels))) for share in BUDGETS]
        costs = [false * false_positive_cost + missed * false_negative_cost for _, false, missed in points]
        total = int(labels.sum())
        orders[name] = {
            "recall": [hits / total if total else None for hits, _, _ in points],
            "precision": [hits / (hits + false) if hits + false else None for hits, false, _ in points],
            "cost": [cost / len(labels) for cost in costs],
        }
    best = min(ORDERS, key=lambda name: float(np.mean(orders[name]["cost"])))
    return {"budgets": list(BUDGETS), "orders": orders, "best": best}


def cascade_curve(labels: np.ndarray, cheap: np.ndarray, costly: np.ndarray, cheap_cost: float) -> dict[str, Any]:
    """Metrics of a costly model that sees only the posts that a cheap one ranks highest.

    Args:
        labels: int[n], 1 and 0, both there.
        cheap, costly: float[n], scores of both models.
        cheap_cost: of the cheap model for a post, beside the costly one's 1.

    Returns:
        {"shares": […], "cost": […], "recall": […], "average_precision": […]}: share of posts that the costly model
        sees; mean cost of a post; violations that reach the costly model; average precision with those that it never
        sees ranked last, in the order of the cheap one.
    """
    from sklearn.metrics import average_precision_score

    order = np.argsort(-cheap, kind="stable")
    shares = [share for share in BUDGETS if share]
    recall, precision = [], []
    for share in shares:
        seen = order[: max(1, round(share * len(labels)))]
        scores = cheap - cheap.max() - 1.0
        scores[seen] = costly[seen] - costly.min()
        recall.append(float(labels[seen].sum() / labels.sum()))
        precision.append(float(average_precision_score(labels, scores)))
    costs = [cheap_cost + share for share in shares]
    return {"shares": shares, "cost": costs, "recall": recall, "average_precision": precision}


def measure_routing(
    predictions: Predictions,
    calibrated: np.ndarray,
    cheaper: Mapping[str, Predictions],
    costs: Mapping[str, float],
    config: EvaluationConfig,
) -> dict[str, Any]:
    """Review curves of each policy, and cascades with each cheaper model, over known labels.

    Args:
        predictions: of the model.
        calibrated: float[posts, policies], its probabilities.
        cheaper: name -> predictions on the same posts; those without a post are left out.
        costs: of the cheaper ones for a post, beside the model's 1; those that are not known do not count.
        config: costs of wrong decisions, and the least number of positives and negatives of a policy.
    """
    found: dict[str, Any] = {}
    for column, policy in enumerate(predictions.policies):
        known = Known.of(predictions, policy)
        positives = int(known.labels.sum())
        if min(positives, len(known.labels) - positives) < config.min_positives:
            continue
        rows = ~np.isnan(predictions.labels[:, column])
        of_errors = (config.false_positive_cost, config.false_negative_cost)
        found[policy] = {"review": review_curves(known.labels, calibrated[rows, column], *of_errors)}
        cascades = {
            name: cascade_curve(known.labels, other.scores[rows, column], known.scores, costs.get(name, 0.0))
            for name, other in cheaper.items()
            if other.ids == predictions.ids
        }
        if cascades:
            found[policy]["cascade"] = cascades
    return found


def _reviewed(labels: np.ndarray, acts: np.ndarray, count: int) -> tuple[int, int, int]:
    """(violations acted on, benign posts acted on, violations missed) where people see the first `count` posts."""
    hits = int(labels[:count].sum() + labels[count:][acts[count:]].sum())
    false = int((1 - labels[count:])[acts[count:]].sum())
    return hits, false, int(labels.sum()) - hits

"""How well severities are ranked: quadratic weighted kappa (Cohen, 1968) and mean absolute error of the nearest level.

Posts without a given severity take no part. Intervals come from samples drawn anew, each cell of the table of given
and predicted levels with a Poisson number of posts (Hanley and MacGibbon, 2006).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from crossguard.train.evaluation.intervals import LEVEL, RESAMPLES
from crossguard.train.evaluation.predictions import Predictions


def measure_severity(
    predictions: Predictions, policy: str, min_positives: int, *, intervals: bool = True
) -> dict[str, Any]:
    """{"all": cell, "by_language": {language: cell}} of a policy with a severity.

    A cell is {"n", "positives" (posts above level 0), "quadratic_kappa", "mean_absolute_error", "intervals"}, or {"n",
    "positives", "insufficient": True} with fewer than `min_positives` posts above level 0, or at it.
    """
    expected, given = predictions.severity[policy].T
    known = ~np.isnan(given)
    given, nearest = given[known].astype(np.int64), np.rint(expected[known]).astype(np.int64)
    languages = np.array(predictions.languages, dtype=object)[known]

    def cell(rows: np.ndarray) -> dict[str, Any]:
        return _cell(given[rows], nearest[rows], min_positives, intervals)

    return {
        "all": cell(np.ones(len(given), dtype=bool)),
        "by_language": {str(language): cell(languages == language) for language in sorted(set(languages))},
    }


def _cell(given: np.ndarray, nearest: np.ndarray, min_positives: int, intervals: bool) -> dict[str, Any]:
    from sklearn.metrics import cohen_kappa_score, mean_absolute_error

    counts = {"n": len(given), "positives": int((given > 0).sum())}
    if min(counts["positives"], counts["n"] - counts["positives"]) < min_positives:
        return counts | {"insufficient": True}
    levels = int(max(given.max(), nearest.max())) + 1
    found = {
        "quadratic_kappa": float(cohen_kappa_score(given, nearest, labels=list(range(levels)), weights="quadratic")),
        "mean_absolute_error": float(mean_absolute_error(given, nearest)),
    }
    return counts | found | ({"intervals": _intervals(given, nearest, levels)} if intervals else {})


def _intervals(given: np.ndarray, nearest: np.ndarray, levels: int) -> dict[str, list[float]]:
    """Metric -> [low, high]; one that no draw changes has none."""
    table = np.zeros((levels, levels), dtype=np.int64)
    np.add.at(table, (given, nearest), 1)
    drawn = np.random.default_rng(len(given)).poisson(table, (RESAMPLES, levels, levels)).astype(np.float64)
    found = {}
    for name, values in _of_tables(drawn).items():
        low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        if low < high:
            found[name] = [float(low), float(high)]
    return found


def _of_tables(tables: np.ndarray) -> dict[str, np.ndarray]:
    """Both metrics of each table [B, levels, levels] of given and predicted levels; NaN where one is not defined."""
    far = np.abs(np.subtract.outer(np.arange(tables.shape[1]), np.arange(tables.shape[1]))).astype(np.float64)
    total = tables.sum(axis=(1, 2))
    by_chance = np.einsum("bi,bj->bij", tables.sum(axis=2), tables.sum(axis=1))
    observed, expected = (tables * far**2).sum(axis=(1, 2)), (by_chance * far**2).sum(axis=(1, 2))
    with np.errstate(invalid="ignore"):
        kappa = 1 - observed * total / np.where(expected > 0, expected, np.nan)
        return {"quadratic_kappa": kappa, "mean_absolute_error": (tables * far).sum(axis=(1, 2)) / total}

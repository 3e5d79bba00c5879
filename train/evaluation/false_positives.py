"""Whether benign posts of some groups are flagged more often than those of others: the gap of false positive rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from crossguard.train.evaluation.intervals import LEVEL, proportion_interval

# The score above which this share of all benign posts lies is the threshold that groups are compared at.
RATE = 0.05


def false_positive_gaps(
    labels: np.ndarray, scores: np.ndarray, slices: Mapping[str, np.ndarray], min_negatives: int
) -> dict[str, Any]:
    """Compare the groups of each slice at one threshold, at which RATE of all benign posts are flagged.

    Args:
        labels: int[n], 1 and 0.
        scores: float[n].
        slices: slice -> group of each post, object[n].
        min_negatives: groups with fewer benign posts are left out.

    Returns:
        {"threshold": t, "by": {slice: {"gap", "interval", "highest", "lowest", "groups": {group: {"n", "rate",
        "interval"}}}}}; a slice needs two groups. The intervals of a slice's groups hold together (Bonferroni), so that
        of the gap is conservative. Empty where no slice can be compared.
    """
    benign = labels == 0
    if benign.sum() < min_negatives:
        return {}
    scores = scores[benign]
    threshold = float(np.quantile(scores, 1 - RATE, method="higher"))
    flagged = scores > threshold
    found = {}
    for name, groups in slices.items():
        counts = {str(group): flagged[groups[benign] == group] for group in sorted(set(groups[benign]))}
        counts = {group: hits for group, hits in counts.items() if len(hits) >= min_negatives}
        if len(counts) > 1:
            found[name] = _gap({group: (int(hits.sum()), len(hits)) for group, hits in counts.items()})
    return {"threshold": threshold, "by": found} if found else {}


def _gap(counts: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    level = 1 - (1 - LEVEL) / len(counts)
    rates = {group: hits / trials for group, (hits, trials) in counts.items()}
    bounds = {group: proportion_interval(hits, trials, level) for group, (hits, trials) in counts.items()}
    highest, lowest = max(rates, key=rates.__getitem__), min(rates, key=rates.__getitem__)
    # The largest of the lower bounds of all pairs' differences; and of the upper ones.
    low = max(low for low, _ in bounds.values()) - min(high for _, high in bounds.values())
    high = max(high for _, high in bounds.values()) - min(low for low, _ in bounds.values())
    return {
        "gap": rates[highest] - rates[lowest],
        "interval": [max(0.0, low), high],
        "highest": highest,
        "lowest": lowest,
        "groups": {
            group: {"n": counts[group][1], "rate": rates[group], "interval": list(bounds[group])} for group in counts
        },
    }

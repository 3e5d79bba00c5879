"""How far probabilities are from what happens: calibration error, Brier score, the points of a reliability diagram."""

from __future__ import annotations

from typing import Any

import numpy as np

from crossguard.train.evaluation.intervals import proportion_interval

BINS = 15
# Posts of a bin at least, where there are so many.
LEAST = 10


def reliability(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Expected calibration error over bins of equally many posts, as it is and without its bias, and Brier score.

    Chance alone makes a perfect model err in every bin: at 300 posts by about .055. What chance adds to each bin's
    distance is estimated from its binomial error and taken off (after Kumar et al., 2019, arXiv 1909.10155).

    Args:
        labels: int[n], 1 and 0, n ≥ 1.
        scores: float[n], in [0, 1].

    Returns:
        ece, ece_debiased, brier.
    """
    from scipy.stats import norm
    from sklearn.metrics import brier_score_loss

    parts = _bins(scores)
    counts = np.array([len(part) for part in parts])
    rates = np.array([labels[part].mean() for part in parts])
    distances = np.abs(rates - [scores[part].mean() for part in parts])
    # As if each bin held one violation and one benign post more: a bin without either has an error too.
    smooth = (rates * counts + 1) / (counts + 2)
    errors = np.sqrt(smooth * (1 - smooth) / counts)
    # The distance that is left without its own error, and the mean distance that would be seen from there.
    likely = np.sqrt(np.maximum(distances**2 - errors**2, 0))
    ratio = likely / errors
    seen = errors * np.sqrt(2 / np.pi) * np.exp(-(ratio**2) / 2) + likely * (1 - 2 * norm.cdf(-ratio))
    shares = counts / counts.sum()
    return {
        "ece": float((shares * distances).sum()),
        "ece_debiased": float(max(0.0, (shares * (distances - (seen - likely))).sum())),
        "brier": float(brier_score_loss(labels, scores)),
    }


def diagram(labels: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
    """The bins: posts, mean score, share of violations and its exact interval, in the order of scores."""
    points = []
    for part in _bins(scores):
        positives = int(labels[part].sum())
        interval = list(proportion_interval(positives, len(part)))
        rate = positives / len(part)
        points.append({"n": len(part), "score": float(scores[part].mean()), "rate": rate, "interval": interval})
    return points


def _bins(scores: np.ndarray) -> list[np.ndarray]:
    """Rows of each bin: BINS of nearly as many posts, fewer where they would hold less than LEAST."""
    order = np.argsort(scores, kind="stable")
    return np.array_split(order, min(BINS, max(1, len(order) // LEAST)))

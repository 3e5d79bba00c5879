"""Prevalence: which share of posts, or of their views, violates a policy, from few labels, also where it is rare.

A uniform sample finds next to nothing at one in a thousand. Here posts are drawn more often where the model expects
violations, in strata of about equal spread (Dalenius and Hodges, 1959) with Neyman's allocation, and every label counts
for the posts that it stands for: whatever the scores are worth, the estimate has no bias, it only becomes wider. Its
interval is that of a gamma distribution with the estimate's mean and variance (after Fay and Feuer, 1997): unlike a
normal one it stays above 0 and holds where a handful of violations was found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crossguard.configs.errors import UserError
from crossguard.train.evaluation.intervals import LEVEL

STRATA = 20
# A part of the sample that goes to where the model expects nothing, since it may be wrong there.
DEFENSIVE = 0.1
# Labels of a stratum at least.
LEAST = 2
# Before any label, half a violation is supposed to have been found where they are expected, and the variance of one.
SUPPOSED_FOUND, SUPPOSED_SPREAD = 0.5, 1.0
# How much of the variance is that of the violations expected in each stratum, and not of those found: a rare one that
# would count for many posts mostly is not in the sample, and then says nothing of itself.
EXPECTED_SPREAD = 0.12


@dataclass(frozen=True)
class Design:
    """How a sample is drawn."""

    # The posts of each stratum, and how many of them are drawn.
    rows: list[np.ndarray]
    counts: np.ndarray
    # Share of the population that each stratum is, and the violations expected of a post there.
    shares: np.ndarray
    expected: np.ndarray
    # What each post counts, float[n].
    views: np.ndarray

    @classmethod
    def of(cls, probabilities: np.ndarray, count: int, views: np.ndarray | None = None) -> Design:
        """The design for a population.

        Args:
            probabilities: float[n], of a violation, for every post.
            count: posts to label, about.
            views: float[n] above 0, what a post counts; by default all count the same.

        Raises:
            UserError: there are not enough posts for a sample of that size.
        """
        if count < STRATA * LEAST or len(probabilities) < count:
            raise UserError(
                f"posts={count}: must lie between {STRATA * LEAST} and the {len(probabilities)} posts of the population"
            )
        views = np.ones(len(probabilities)) if views is None else views
        expected = (1 - DEFENSIVE) * probabilities + DEFENSIVE * probabilities.mean()
        order = np.argsort(expected, kind="stable")
        spread = np.cumsum(np.sqrt(expected[order]) * views[order])
        ends = np.searchsorted(spread, spread[-1] * np.arange(1, STRATA) / STRATA)
        rows = [part for part in np.split(order, ends) if len(part)]
        seen = np.array([views[part].sum() for part in rows])
        means = np.array([(expected[part] * views[part]).sum() for part in rows]) / seen
        wanted = seen * np.sqrt(means)
        counts = np.maximum(LEAST, np.floor(count * wanted / wanted.sum()).astype(np.int64))
        sizes = np.array([len(part) for part in rows])
        return cls(rows, np.minimum(sizes, counts), seen / seen.sum(), means, views)

    def draw(self, seed: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """The rows that are drawn, int[m], and for each what `estimate` must know: "stratum"; "share" of the population
        and "size" of the stratum; "value" of the post beside the stratum's mean; "expected" violations.
        """
        draw = np.random.default_rng(seed)
        drawn: list[int] = []
        known: list[dict[str, Any]] = []
        for number, (rows, count) in enumerate(zip(self.rows, self.counts, strict=True)):
            chosen = np.sort(rows[draw.permutation(len(rows))[:count]]) if count < len(rows) else np.sort(rows)
            about = {"stratum": number, "share": float(self.shares[number]), "size": len(rows)}
            values = self.views[chosen] / self.views[rows].mean()
            drawn += chosen.tolist()
            known += [about | {"value": value, "expected": float(self.expected[number])} for value in values.tolist()]
        return np.array(drawn), known


def estimate(sample: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The prevalence from a labeled sample.

    Args:
        sample: for each post what `Design.draw` returned, and its "label": 1, 0, a fraction, or None for unknown.

    Returns:
        {"prevalence", "interval", "labels", "violating", "variance_of_uniform"}: the last says how many times the
        variance of a uniform sample of as many labels is larger; it is absent where no violation was found.

    Raises:
        UserError: a stratum has no label, so that nothing is known of its posts.
    """
    from scipy.stats import gamma

    known = [one for one in sample if one["label"] is not None]
    silent = {one["stratum"] for one in sample} - {one["stratum"] for one in known}
    if silent or not known:
        raise UserError(f"{len(silent)} strata of the sample have no label; label at least some posts of each")
    columns = {name: np.array([one[name] for one in known], dtype=np.float64) for name in known[0] if name != "id"}
    _, stratum = np.unique(columns["stratum"], return_inverse=True)
    labels = np.bincount(stratum)[stratum]
    # What a violation adds: the stratum's share over its labels.
    weights = columns["share"] / labels * columns["value"]
    unseen = 1 - labels / columns["size"]
    found = weights * columns["label"]
    supposed = columns["expected"] / columns["expected"].sum()
    mean = float((found + SUPPOSED_FOUND * supposed * weights).sum())
    expected = columns["expected"] * mean / (weights * columns["expected"]).sum()
    spread = (1 - EXPECTED_SPREAD) * columns["label"] + EXPECTED_SPREAD * expected + SUPPOSED_SPREAD * supposed
    variance = float((weights**2 * unseen * spread).sum())
    prevalence = float(found.sum())
    interval = [prevalence, prevalence]
    if variance > 0:  # else every post is labeled
        interval = gamma.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2], mean**2 / variance, scale=variance / mean).tolist()
    result = {
        "prevalence": prevalence,
        "interval": [interval[0], min(1.0, interval[1])],
        "labels": len(known),
        "violating": float(columns["label"].sum()),
    }
    seen = float((weights**2 * unseen * columns["label"]).sum())
    return result | ({"variance_of_uniform": prevalence * (1 - prevalence) / len(known) / seen} if seen > 0 else {})

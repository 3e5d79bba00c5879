"""Two runs on the same posts: differences of metrics with paired intervals, and which groups got worse beyond chance.

Both models are measured on the same resampled posts, so that what makes a post hard for both cancels out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from crossguard.configs.errors import UserError
from crossguard.configs.schema import EvaluationConfig
from crossguard.train.evaluation.intervals import LEVEL, ranking_metrics
from crossguard.train.evaluation.metrics import TARGET_PRECISION, Known
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.slices import LANGUAGE

COMPARED = ("average_precision", "auroc")
RESAMPLES = 300
# Weights that are held at a time: 64 MB.
MOST_WEIGHTS = 8_000_000
EVERYTHING = "all"
# The chance that any group at all is called worse where none is.
ALPHA = 0.05


def read_run(run_dir: Path) -> dict[str, Predictions]:
    """Split -> predictions of an evaluated run.

    Raises:
        UserError: it has none.
    """
    files = sorted((run_dir / "predictions").glob("*.parquet"))
    if not files:
        raise UserError(f"{run_dir}: no predictions/ to compare with; run `crossguard evaluate` there first")
    return {file.stem: Predictions.read(file) for file in files}


def compare(new: Mapping[str, Predictions], old: Mapping[str, Predictions], config: EvaluationConfig) -> dict[str, Any]:
    """Compare two runs on the posts, splits and policies that both have; labels are those of the new one.

    Args:
        new, old: split -> predictions.
        config: `min_positives`, `slices` and `margin`.

    Returns:
        {"splits": {split: {"posts": n, "groups": […]}}, "worse": […]}, where a group is {"policy", "slice", "group",
        "n", "positives", metric: {"new", "old", "difference", "interval", "error"}}. Those that got worse by more than
        the margin, all together with a chance of ALPHA of being wrong (Bonferroni), are {"split", "policy", "slice",
        "group", "metric", "difference"}.

    Raises:
        UserError: they have no post or no policy in common.
    """
    splits: dict[str, Any] = {}
    for split in (name for name in new if name in old):
        ours, theirs = _common(new[split], old[split])
        if len(ours):
            splits[split] = {"posts": len(ours), "groups": _groups(ours, theirs, config)}
    if not splits or not any(set(new[name].policies) & set(old[name].policies) for name in splits):
        raise UserError("the two runs have no posts of a common policy in any common split; nothing can be compared")
    return {"splits": splits, "worse": _worse(splits, config.margin)}


def paired_differences(labels: np.ndarray, new: np.ndarray, old: np.ndarray, seed: int) -> dict[str, dict[str, Any]]:
    """Metric -> both values, new minus old, its interval over resampled posts and its standard error.

    Args:
        labels: int[n], 1 and 0, each at least once.
        new, old: float[n], the scores of both models.
        seed: of the draws.
    """
    draw = np.random.default_rng(seed)
    chunk = max(1, MOST_WEIGHTS // len(labels))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in COMPARED}
    for start in range(0, RESAMPLES, chunk):
        weights = draw.poisson(1.0, (min(chunk, RESAMPLES - start), len(labels))).astype(np.float32)
        ours, theirs = (_weighted(labels, scores, weights) for scores in (new, old))
        for name in COMPARED:
            parts[name].append(ours[name] - theirs[name])
    once = np.ones((1, len(labels)), dtype=np.float32)
    found = {}
    for name in COMPARED:
        values = [float(_weighted(labels, scores, once)[name][0]) for scores in (new, old)]
        drawn = np.concatenate(parts[name])
        drawn = drawn[np.isfinite(drawn)]
        interval = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist() if len(drawn) else [-1.0, 1.0]
        found[name] = {
            "new": values[0],
            "old": values[1],
            "difference": values[0] - values[1],
            "interval": interval,
            "error": float(drawn.std()) if len(drawn) else 1.0,
        }
    return found


def _weighted(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of every row of weights [B, n]; equal scores count as one."""
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(scores[order]) != 0]))
    sorted_weights, positive = weights[:, order], labels[order] == 1
    positives = np.add.reduceat(sorted_weights * positive, starts, axis=1)
    negatives = np.add.reduceat(sorted_weights * ~positive, starts, axis=1)
    return ranking_metrics(positives, negatives, TARGET_PRECISION)


def _common(new: Predictions, old: Predictions) -> tuple[Predictions, Predictions]:
    """Both on the posts that both have, in one order."""
    places = {post: row for row, post in enumerate(old.ids)}
    rows = [row for row, post in enumerate(new.ids) if post in places]
    return new.take(rows), old.take([places[new.ids[row]] for row in rows])


def _groups(new: Predictions, old: Predictions, config: EvaluationConfig) -> list[dict[str, Any]]:
    found = []
    for policy in (name for name in new.policies if name in old.policies):
        known = Known.of(new, policy, config.slices)
        labeled = ~np.isnan(new.labels[:, new.policies.index(policy)])
        before = old.scores[labeled, old.policies.index(policy)]
        everything = np.full(len(known.labels), EVERYTHING, dtype=object)
        for name, groups in {EVERYTHING: everything, LANGUAGE: known.languages, **known.slices}.items():
            for group in sorted(set(groups)):
                rows = groups == group
                labels = known.labels[rows]
                positives = int(labels.sum())
                if min(positives, len(labels) - positives) < config.min_positives:
                    continue
                place = {"policy": policy, "slice": name, "group": str(group), "n": len(labels), "positives": positives}
                found.append(place | paired_differences(labels, known.scores[rows], before[rows], seed=len(labels)))
    return found


def _worse(splits: Mapping[str, Any], margin: float) -> list[dict[str, Any]]:
    from scipy.stats import norm

    tests = [(split, group, metric) for split, one in splits.items() for group in one["groups"] for metric in COMPARED]
    z = float(norm.ppf(1 - ALPHA / len(tests))) if tests else 0.0
    worse = []
    for split, group, metric in tests:
        found = group[metric]
        if found["difference"] + z * found["error"] < -margin:
            place = {name: group[name] for name in ("policy", "slice", "group")}
            worse.append({"split": split, **place, "metric": metric, "difference": found["difference"]})
    return sorted(worse, key=lambda one: one["difference"])


def in_words(one: Mapping[str, Any]) -> str:
    """A group that got worse, for a message."""
    where = "" if one["slice"] == EVERYTHING else f" where {one['slice']} is {one['group']}"
    return f"{one['split']}: {one['policy']}{where}, {one['metric']} {one['difference']:+.3f}"

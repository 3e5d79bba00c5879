"""What the report shows of mistakes: the worst by id, suites, and what reviewing more posts would mend."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from crossguard.data.loading.reader import SampleError, ShardReader
from crossguard.train.evaluation.metrics import POSITIVE_FROM
from crossguard.train.evaluation.plots import Panel, share_panel
from crossguard.train.evaluation.predictions import Predictions

# Posts that are named, for each policy and kind of mistake.
MOST_ERRORS = 10


def worst_errors(predictions: Predictions, reader: ShardReader | None) -> list[dict[str, Any]]:
    """For each policy the benign posts with the highest scores and the violating ones with the lowest.

    Args:
        predictions: of a split.
        reader: the split, to show the posts' texts as well; without it they are shown by id alone.
    """
    found = []
    for column, policy in enumerate(predictions.policies):
        scores, labels = predictions.scores[:, column], predictions.labels[:, column]
        known = ~np.isnan(labels)
        violating = known & (np.nan_to_num(labels) >= POSITIVE_FROM)
        for kind, rows, sign in (("benign", known & ~violating, -1), ("violating", violating, 1)):
            candidates = np.flatnonzero(rows)
            order = candidates[np.argsort(sign * scores[candidates], kind="stable")][:MOST_ERRORS]
            posts = [
                {
                    "id": (post := predictions.ids[row]),
                    "language": predictions.languages[row],
                    "score": float(scores[row]),
                    "text": None if reader is None else _text(reader, post),
                }
                for row in order
            ]
            if posts:
                found.append({"policy": policy, "kind": kind, "posts": posts})
    return found


def _text(reader: ShardReader, post: str) -> str | None:
    """What a post says; None where it cannot be read any more."""
    row = reader.row_of(post)
    with suppress(SampleError):
        return None if row is None else reader.read_head(row).text
    return None


def review_panels(measured: Mapping[str, Any]) -> list[Panel]:
    """Recall of the whole system over the share that people see; a straight line is a choice by chance."""
    panels = []
    for policy, routing in measured.get("routing", {}).items():
        review = routing["review"]
        lines = {review["best"]: (review["budgets"], review["orders"][review["best"]]["recall"])}
        lines |= {name: (review["budgets"], one["recall"]) for name, one in review["orders"].items()}
        start = review["orders"][review["best"]]["recall"][0]
        panels.append(share_panel(f"{policy}: review", lines, "sent to people", "recall", start))
    return panels


def cascade_panels(measured: Mapping[str, Any]) -> list[Panel]:
    """Average precision of a cascade over what a post costs."""
    return [
        share_panel(
            f"{policy}: cascade",
            {name.replace("_", " "): (one["cost"], one["average_precision"]) for name, one in cascades.items()},
            "cost of a post",
            "average precision",
        )
        for policy, routing in measured.get("routing", {}).items()
        if (cascades := routing.get("cascade"))
    ]


def suite_tables(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each policy that a suite tests: functionalities as rows, the worst first, languages as columns."""
    tables = []
    for policy, result in metrics.get("suite", {}).get("policies", {}).items():
        languages = list(result["by_language"])
        by_both = result["by_functionality_and_language"]
        rows = [
            {"name": name, "cell": cell, "cells": [by_both[name].get(language) for language in languages]}
            for name, cell in sorted(result["by_functionality"].items(), key=lambda item: item[1]["pass_rate"])
        ]
        whole = {"name": "all", "cell": result["all"], "cells": list(result["by_language"].values())}
        tables.append(
            {"policy": policy, "threshold": result["threshold"], "languages": languages, "rows": [whole, *rows]}
        )
    return tables

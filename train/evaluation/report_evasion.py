"""What the report shows of disguised texts: families of attacks, the model beside its ablations, policy by policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crossguard.train.evaluation.evasion import POINT


def evasion_tables(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table for each operating point: families as rows, the model and its ablations as columns; policies below."""
    if "evasion" not in metrics:
        return []
    models = {"this model": metrics["evasion"]}
    models |= {name: one["evasion"] for name, one in metrics.get("ablations", {}).items() if "evasion" in one}
    families = metrics["evasion"]["families"]
    points = dict.fromkeys([POINT, *(point for found in families.values() for point in found)])
    return [_table(point, models, families) for point in points]


def _table(point: str, models: Mapping[str, Any], families: Mapping[str, Any]) -> dict[str, Any]:
    shown = {
        name: one["families"]
        for name, one in models.items()
        if any(point in found for found in one["families"].values())
    }
    return {
        "point": point,
        "is_share": point == POINT,
        "models": list(shown),
        "rows": [
            {"family": family, "cells": [one[family].get(point, {}).get("macro") for one in shown.values()]}
            for family in families
        ],
        "policies": [
            {"family": family, "policy": policy, "cell": found["all"]}
            for family in families
            for policy, found in families[family].get(point, {}).get("policies", {}).items()
            if "insufficient" not in found["all"]
        ],
    }

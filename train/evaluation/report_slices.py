"""What the report shows of groups of posts: heat maps of slice × policy, and gaps of false positives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crossguard.train.evaluation.slices import LANGUAGE


def heat_map(measured: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Groups of a slice (or languages) as rows, the largest first; policies as columns."""
    cells = {
        policy: result["by_language"] if name == LANGUAGE else result.get("by_slice", {}).get(name, {})
        for policy, result in measured["policies"].items()
    }
    sizes: dict[str, int] = {}
    for by_group in cells.values():
        for group, cell in by_group.items():
            sizes[group] = max(sizes.get(group, 0), cell["n"])
    rows = [
        (group, [by_group.get(group) for by_group in cells.values()])
        for group in sorted(sizes, key=lambda group: (-sizes[group], group))
    ]
    return {"policies": list(cells), "rows": rows}


def slice_maps(measured: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A heat map for each slice."""
    names = dict.fromkeys(name for result in measured["policies"].values() for name in result.get("by_slice", {}))
    return {name: heat_map(measured, name) for name in names}


def gap_rows(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each policy and slice with a gap between its groups, the widest first."""
    rows = []
    for policy, result in measured["policies"].items():
        for name, gap in result.get("false_positive_gap", {}).get("by", {}).items():
            if not gap["gap"]:
                continue
            ends = {end: gap["groups"][gap[end]] | {"group": gap[end]} for end in ("highest", "lowest")}
            rows.append({"policy": policy, "slice": name, "gap": gap["gap"], "interval": gap["interval"], **ends})
    return sorted(rows, key=lambda row: -row["gap"])

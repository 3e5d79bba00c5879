"""What the report shows of decisions: reliability diagrams, calibration errors by language, thresholds and promises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crossguard.train.evaluation.decisions import NO_LABELS
from crossguard.train.evaluation.plots import Panel, reliability_panel
from crossguard.train.evaluation.slices import LANGUAGE


def diagrams(measured: Mapping[str, Any]) -> list[Panel]:
    """A reliability diagram for each policy with enough labels."""
    return [
        reliability_panel(policy, result["all"]["diagram"])
        for policy, result in measured.get("calibration", {}).items()
        if "diagram" in result["all"]
    ]


def calibration_rows(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each policy, and for each of its languages the one with the largest error first."""
    rows = []
    for policy, result in measured.get("calibration", {}).items():
        if "insufficient" in result["all"]:
            continue
        rows.append({"policy": policy, "language": "all languages", **result["all"]})
        languages = [
            {"policy": policy, "language": language, **cell}
            for language, cell in result["by_slice"][LANGUAGE].items()
            if "insufficient" not in cell
        ]
        rows += sorted(languages, key=lambda row: -row["calibrated"]["ece_debiased"])
    return rows


def threshold_rows(metrics: Mapping[str, Any], split: str) -> dict[str, list[dict[str, Any]]]:
    """A row for each policy, language and action: those with a threshold, and what they reached on the split; those
    that abstain although there are labels."""
    reached = metrics["splits"][split].get("actions", {})
    rows: dict[str, list[dict[str, Any]]] = {"kept": [], "abstaining": []}
    for policy, languages in metrics.get("decisions", {}).get("thresholds", {}).items():
        for language, actions in languages.items():
            for action, threshold in actions.items():
                if threshold.get("abstains") == NO_LABELS:
                    continue
                row = {"policy": policy, "language": language, "action": action, "threshold": threshold}
                cell = reached.get(policy, {}).get(action, {}).get("by_language", {}).get(language)
                kind = "abstaining" if threshold["above"] is None else "kept"
                rows[kind].append(row | {"reached": cell})
    return rows

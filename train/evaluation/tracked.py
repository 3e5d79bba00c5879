"""The report's figures for the tracker: tables and pictures. Posts appear as counts alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crossguard.configs.schema.evaluation import METRICS
from crossguard.train.evaluation.metrics import groups_in
from crossguard.train.evaluation.plots import Panel
from crossguard.train.evaluation.report_decisions import calibration_rows, threshold_rows
from crossguard.train.evaluation.splits import shown_split
from crossguard.train.tracking import Row, Tracker


def track_report(tracker: Tracker, metrics: Mapping[str, Any], panels: Mapping[str, Sequence[Panel]]) -> None:
    """Hand over what the report shows.

    Args:
        tracker: of the run.
        metrics: the content of report/metrics.json.
        panels: section of the report -> its plots.
    """
    split = shown_split(metrics["splits"])
    tables = {
        "policies": [row for name, measured in metrics["splits"].items() for row in _cells(name, measured)],
        "calibration": [_calibration(row) for row in calibration_rows(metrics["splits"][split])],
        "thresholds": [_threshold(row) for rows in threshold_rows(metrics, split).values() for row in rows],
    }
    pictures = {section: {panel.title: panel.png() for panel in drawn} for section, drawn in panels.items()}
    tracker.report(
        {name: rows for name, rows in tables.items() if rows}, {name: some for name, some in pictures.items() if some}
    )


def _cells(split: str, measured: Mapping[str, Any]) -> list[Row]:
    """A row for each policy, language and group of a slice."""
    rows: list[Row] = []
    for policy, result in measured["policies"].items():
        for slice_name, group, cell in [("all", "all", result["all"]), *groups_in(result)]:
            row: Row = {"split": split, "policy": policy, "slice": slice_name, "group": group}
            row |= {"n": cell["n"], "positives": cell["positives"]}
            for metric in METRICS:
                low, high = cell.get("intervals", {}).get(metric, (None, None))
                row |= {metric: cell.get(metric), f"{metric} low": low, f"{metric} high": high}
            rows.append(row)
    return rows


def _calibration(row: Mapping[str, Any]) -> Row:
    calibrated = row["calibrated"]
    return {
        "policy": row["policy"],
        "language": row["language"],
        "n": row["n"],
        "error of scores": row["raw"]["ece_debiased"],
        "error calibrated": calibrated["ece_debiased"],
        "brier": calibrated["brier"],
    }


def _threshold(row: Mapping[str, Any]) -> Row:
    threshold, reached = row["threshold"], row["reached"] or {}
    return {
        "policy": row["policy"],
        "language": row["language"],
        "action": row["action"],
        "score above": threshold["above"],
        "at least": threshold.get("at_least"),
        "abstains": threshold.get("abstains"),
        "precision": (reached.get("precision") or {}).get("value"),
        "recall": (reached.get("recall") or {}).get("value"),
    }

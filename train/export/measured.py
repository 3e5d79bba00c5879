"""What `crossguard evaluate` measured of the model that is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crossguard.train.evaluation.decisions import Decisions


def measured(run_dir: Path) -> dict[str, Any] | None:
    """The content of report/metrics.json; None where nothing was measured."""
    file = run_dir / "report" / "metrics.json"
    if not file.exists():
        return None
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def decisions_of(run_dir: Path, step: int) -> Decisions:
    """Calibration and thresholds of the checkpoint after `step`: without any where they are of another one."""
    metrics = measured(run_dir)
    if metrics is None or "decisions" not in metrics or metrics["checkpoint"]["step"] != step:
        return Decisions({}, {}, {})
    return Decisions.from_json(metrics["decisions"])

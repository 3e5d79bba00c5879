"""How calibrated probabilities and thresholds do on a split: calibration errors by slice, what each action reached."""

from __future__ import annotations

from typing import Any

import numpy as np

from crossguard.configs.schema import EvaluationConfig
from crossguard.train.evaluation.decisions import Decisions
from crossguard.train.evaluation.intervals import proportion_interval
from crossguard.train.evaluation.metrics import Known
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.reliability import diagram, reliability
from crossguard.train.evaluation.slices import LANGUAGE


def measure_calibration(
    predictions: Predictions, calibrated: np.ndarray, config: EvaluationConfig
) -> dict[str, dict[str, Any]]:
    """Errors of scores and of calibrated probabilities, over known labels.

    Returns:
        policy -> {"all": cell, "by_slice": {slice: {group: cell}}, "worst_language": {"language", "ece_debiased"}},
        where a cell is {"n", "positives", "raw": errors, "calibrated": errors}, or {…, "insufficient": True}; `all` has
        "diagram", the bins of both.
    """
    found = {}
    for column, policy in enumerate(predictions.policies):
        known = Known.of(predictions, policy, config.slices)
        rows = ~np.isnan(predictions.labels[:, column])
        kinds = {"raw": known.scores, "calibrated": calibrated[rows, column]}

        def cell(chosen: np.ndarray, known: Known = known, kinds: dict[str, np.ndarray] = kinds) -> dict[str, Any]:
            labels = known.labels[chosen]
            counts = {"n": len(labels), "positives": int(labels.sum())}
            if min(counts["positives"], counts["n"] - counts["positives"]) < config.min_positives:
                return counts | {"insufficient": True}
            return counts | {name: reliability(labels, scores[chosen]) for name, scores in kinds.items()}

        everything = cell(np.ones(len(known.labels), dtype=bool))
        if "insufficient" not in everything:
            everything["diagram"] = {name: diagram(known.labels, scores) for name, scores in kinds.items()}
        by_slice = {
            name: {str(group): cell(groups == group) for group in sorted(set(groups))}
            for name, groups in {LANGUAGE: known.languages, **known.slices}.items()
        }
        errors = {
            language: one["calibrated"]["ece_debiased"]
            for language, one in by_slice[LANGUAGE].items()
            if "insufficient" not in one
        }
        found[policy] = {"all": everything, "by_slice": by_slice}
        if errors:
            worst = max(errors, key=errors.__getitem__)
            found[policy]["worst_language"] = {"language": worst, "ece_debiased": errors[worst]}
    return found


def measure_actions(predictions: Predictions, decisions: Decisions) -> dict[str, Any]:
    """What each action reached: policy -> action -> {"all": cell, "by_language": {language: cell}}.

    An action counts where its own threshold is passed, whatever other actions are taken; languages without a threshold
    are left out, of `all` too.
    """
    found: dict[str, Any] = {}
    for policy in predictions.policies:
        known = Known.of(predictions, policy)
        found[policy] = {}
        for action in decisions.promises:
            taken, covered = np.zeros(len(known.labels), dtype=bool), np.zeros(len(known.labels), dtype=bool)
            cells: dict[str, Any] = {}
            for language, thresholds in decisions.thresholds.get(policy, {}).items():
                above, rows = thresholds[action].above, known.languages == language
                if above is None or not rows.any():
                    continue
                covered |= rows
                taken |= rows & (known.scores > above)
                cells[language] = _reached(known.labels[rows], taken[rows])
            if cells:
                found[policy][action] = {"all": _reached(known.labels[covered], taken[covered]), "by_language": cells}
    return found


def _reached(labels: np.ndarray, taken: np.ndarray) -> dict[str, Any]:
    flagged, hits, positives = int(taken.sum()), int(labels[taken].sum()), int(labels.sum())
    cell: dict[str, Any] = {"n": len(labels), "positives": positives, "flagged": flagged, "hits": hits}
    for name, total in (("precision", flagged), ("recall", positives)):
        if total:
            cell[name] = {"value": hits / total, "interval": list(proportion_interval(hits, total))}
    return cell

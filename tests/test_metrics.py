"""Metrics: scikit-learn's on the known labels, and nothing that an unknown label could change."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from crossguard.configs.errors import UserError
from crossguard.configs.schema import EvaluationConfig
from crossguard.train.evaluation.metrics import evaluate_predictions, recall_at_precision
from crossguard.train.evaluation.predictions import Predictions

POLICIES = ("hate", "spam")
LANGUAGES = ("de", "en", "und")
STATES = np.array([0, 0, 1, 0.33, 0.5, np.nan], dtype=np.float32)


def make_predictions(count: int, seed: int = 0) -> Predictions:
    """Scores with ties, and every label state."""
    draw = np.random.default_rng(seed)
    return Predictions(
        POLICIES,
        [f"post/{number:04d}" for number in range(count)],
        list(draw.choice(LANGUAGES, count)),
        draw.integers(0, 40, (count, 2)) / 40,
        draw.choice(STATES, (count, 2)),
    )


def test_cells_are_those_of_scikit_learn_on_the_known_labels() -> None:
    predictions = make_predictions(300)
    measured = evaluate_predictions(predictions, EvaluationConfig(min_positives=5))
    for column, policy in enumerate(POLICIES):
        for language in (None, *LANGUAGES):
            spoken = np.array([language in (None, own) for own in predictions.languages])
            rows = spoken & ~np.isnan(predictions.labels[:, column])
            labels, scores = predictions.labels[rows, column] >= 0.5, predictions.scores[rows, column]
            cells = measured["policies"][policy]
            cell = cells["all"] if language is None else cells["by_language"][language]
            assert (cell["n"], cell["positives"]) == (rows.sum(), labels.sum())
            assert cell["average_precision"] == average_precision_score(labels, scores)
            assert cell["auroc"] == roc_auc_score(labels, scores)


def test_macros_are_unweighted_means_without_insufficient_cells() -> None:
    predictions = make_predictions(120)
    predictions.labels[:, 1] = np.where(np.arange(120) < 3, 1, 0)
    measured = evaluate_predictions(predictions, EvaluationConfig(min_positives=5))
    assert measured["policies"]["spam"]["all"] == {"n": 120, "positives": 3, "insufficient": True}
    hate = measured["policies"]["hate"]
    assert measured["macro"] == {key: hate["all"][key] for key in measured["macro"]}
    cells = list(hate["by_language"].values())
    assert measured["macro_policy_language"]["auroc"] == pytest.approx(np.mean([cell["auroc"] for cell in cells]))


def test_few_negatives_are_insufficient_too_and_a_mean_over_nothing_is_absent() -> None:
    predictions = make_predictions(40)
    predictions.labels[:] = 1
    predictions.labels[:2] = 0
    measured = evaluate_predictions(predictions, EvaluationConfig(min_positives=5))
    assert measured["policies"]["hate"]["all"] == {"n": 40, "positives": 38, "insufficient": True}
    assert "macro" not in measured
    assert "macro_policy_language" not in measured
    nothing = evaluate_predictions(predictions.take(np.array([], dtype=int)), EvaluationConfig())
    assert nothing == {
        "policies": {
            policy: {"all": {"n": 0, "positives": 0, "insufficient": True}, "by_language": {}} for policy in POLICIES
        }
    }


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 80))
def test_unknown_labels_change_nothing(seed: int, count: int) -> None:
    config = EvaluationConfig(min_positives=2)
    predictions = make_predictions(count, seed)
    measured = evaluate_predictions(predictions, config)
    draw = np.random.default_rng(seed)
    # What is said about posts whose label is unknown may be anything.
    scores = np.where(np.isnan(predictions.labels), draw.random(predictions.scores.shape), predictions.scores)
    shuffled = Predictions(POLICIES, predictions.ids, predictions.languages, scores, predictions.labels)
    assert evaluate_predictions(shuffled, config) == measured
    # Posts of which nothing is known may be away.
    known = np.flatnonzero(~np.isnan(predictions.labels).all(axis=1))
    assert evaluate_predictions(predictions.take(known), config) == measured
    # A policy alone is measured as beside others.
    for column, policy in enumerate(POLICIES):
        rows = np.flatnonzero(~np.isnan(predictions.labels[:, column]))
        alone = evaluate_predictions(predictions.take(rows), config)
        assert alone["policies"][policy] == measured["policies"][policy]


def test_recall_at_precision_is_the_best_of_all_thresholds() -> None:
    predictions = make_predictions(200, seed=3)
    labels = (predictions.labels[:, 0] >= 0.5).astype(int)
    scores = predictions.scores[:, 0] + 0.6 * labels
    best = 0.0
    for threshold in np.unique(scores):
        flagged = scores >= threshold
        if labels[flagged].mean() >= 0.9:
            best = max(best, labels[flagged].sum() / labels.sum())
    assert recall_at_precision(labels, scores) == best > 0
    assert recall_at_precision(np.array([0, 0, 1]), np.array([0.9, 0.8, 0.1])) == 0


def test_own_metrics_get_binary_known_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_metrics.py").write_text(
        "def brier(labels, scores):\n"
        "    assert set(labels.tolist()) == {0, 1}\n"
        "    return ((labels - scores) ** 2).mean()\n"
        "def undefined(labels, scores): return float('nan')\n"
        "def nothing(labels, scores): pass\n"
        "def broken(labels, scores): return labels[10_000]\n"
        "def lonely(labels): return 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_metrics", raising=False)
    predictions = make_predictions(100)
    measured = evaluate_predictions(predictions, EvaluationConfig(metrics=["my_metrics:brier"]))
    known = ~np.isnan(predictions.labels[:, 0])
    labels = predictions.labels[known, 0] >= 0.5
    expected = np.mean((labels - predictions.scores[known, 0]) ** 2)
    assert measured["policies"]["hate"]["all"]["brier"] == pytest.approx(expected)
    assert "brier" in measured["macro"]
    for name, message in {
        "undefined": "must return a finite number",
        "nothing": "must return a finite number",
        "broken": r"evaluation.metrics\[0\]=my_metrics:broken: raised IndexError at my_metrics.py:6 \(index 10000",
        "lonely": r"evaluation.metrics\[0\]=my_metrics:lonely: raised TypeError \(lonely\(\) takes 1 positional",
        "breir": "did you mean 'brier'",
    }.items():
        with pytest.raises(UserError, match=message):
            evaluate_predictions(predictions, EvaluationConfig(metrics=[f"my_metrics:{name}"]))


def test_predictions_go_through_parquet_unchanged(tmp_path: Path) -> None:
    predictions = make_predictions(50)
    file = tmp_path / "predictions" / "test.parquet"
    predictions.write(file)
    table = pq.read_table(file)
    assert table.column_names == ["id", "language", "score.hate", "score.spam", "label.hate", "label.spam"]
    assert table["label.hate"].null_count == np.isnan(predictions.labels[:, 0]).sum() > 0
    again = Predictions.read(file)
    assert (again.ids, again.languages, again.policies) == (predictions.ids, predictions.languages, POLICIES)
    np.testing.assert_array_equal(again.scores, predictions.scores)
    np.testing.assert_array_equal(again.labels, predictions.labels)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="no readable predictions"):
        Predictions.read(file)


def test_parts_of_ranks_join_to_each_id_once_in_the_order_of_ids() -> None:
    predictions = make_predictions(30)
    parts = [predictions.take(np.arange(29, 9, -1)), predictions.take(np.arange(15))]
    joined = Predictions.gather(POLICIES, parts)
    assert joined.ids == predictions.ids
    np.testing.assert_array_equal(joined.scores, predictions.scores)
    assert len(Predictions.gather(POLICIES, [])) == 0


def test_scores_with_ties_are_not_ordered_by_chance() -> None:
    predictions = make_predictions(60)
    predictions.scores[:] = 0.5
    measured = evaluate_predictions(predictions, EvaluationConfig(min_positives=1))
    cell = measured["policies"]["hate"]["all"]
    assert cell["auroc"] == 0.5
    assert math.isclose(cell["average_precision"], cell["positives"] / cell["n"])

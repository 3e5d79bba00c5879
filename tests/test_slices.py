"""Slices and intervals: groups of posts, and how sure their numbers are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from build_job import build, make_config, write_lines
from sklearn.metrics import average_precision_score, roc_auc_score
from test_metrics import make_predictions

from crossguard.configs.errors import UserError
from crossguard.configs.schema import EvaluationConfig
from crossguard.data.loading.reader import ShardReader
from crossguard.data.shards.folder import ShardFolder
from crossguard.train.evaluation.false_positives import false_positive_gaps
from crossguard.train.evaluation.intervals import (
    auroc_interval,
    grouped,
    proportion_interval,
    ranking_intervals,
    ranking_metrics,
)
from crossguard.train.evaluation.metrics import evaluate_predictions, recall_at_precision
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.slices import MOST_GROUPS, groups_of, read_fields


def draw_scores(count: int, share: float, apart: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    labels = (draw.random(count) < share).astype(int)
    return labels, np.round(draw.normal(size=count) + apart * labels, 2)


def with_fields(count: int = 400) -> Predictions:
    predictions = make_predictions(count)
    draw = np.random.default_rng(1)
    fields = {
        "region": draw.choice(["EU", "US"], count).astype(object),
        "modality": np.array(["text"] * count, dtype=object),
        "meta.topic": draw.choice(["a", "b", "(none)"], count).astype(object),
    }
    return replace(predictions, fields=fields)


def test_every_group_of_every_slice_is_measured_as_it_would_be_alone() -> None:
    predictions = with_fields()
    config = EvaluationConfig(min_positives=5, slices=["region", "modality", "meta.topic", "language+region+modality"])
    measured = evaluate_predictions(predictions, config, in_detail=True)
    for policy in predictions.policies:
        by_slice = measured["policies"][policy]["by_slice"]
        # The modality is the same everywhere: it divides nothing, alone or beside others.
        assert set(by_slice) == {"region", "meta.topic", "language+region"}
        assert set(by_slice["meta.topic"]) == {"a", "b", "(none)"}
        for name, cells in by_slice.items():
            for group, cell in cells.items():
                parts = dict(zip(name.split("+"), group.split("+"), strict=True))
                columns = {"language": np.array(predictions.languages), **predictions.fields}
                rows = np.all([columns[key] == value for key, value in parts.items()], axis=0)
                alone = evaluate_predictions(predictions.take(np.flatnonzero(rows)), config, in_detail=True)
                assert cell == alone["policies"][policy]["all"]
                assert cell["intervals"]["auroc"][0] < cell["auroc"] < cell["intervals"]["auroc"][1]


def test_the_worst_group_stands_beside_the_mean() -> None:
    predictions = with_fields()
    rows = predictions.fields["region"] == "US"
    predictions.scores[rows, 0] = 1 - predictions.labels[rows, 0]
    predictions.scores[~rows, 0] = predictions.labels[~rows, 0]
    config = EvaluationConfig(min_positives=5, slices=["region"])
    worst = evaluate_predictions(predictions, config, in_detail=True)["worst"]["auroc"]
    assert (worst["policy"], worst["slice"], worst["group"], worst["value"]) == ("hate", "region", "US", 0)
    assert worst["interval"][0] == 0 < worst["interval"][1] < 0.2


def test_a_slice_that_repeats_another_is_left_out_and_large_ones_keep_their_largest_groups() -> None:
    languages = np.array(["de", "en"] * 100, dtype=object)
    fields = {"region": np.where(languages == "de", "EU", "US").astype(object)}
    assert groups_of(["region", "language+region"], languages, fields) == {}
    many = np.array([f"g{min(number, 120)}" for number in range(200)], dtype=object)
    groups = groups_of(["source"], languages, {"source": many})["source"]
    assert len(set(groups)) == MOST_GROUPS + 1
    assert (groups == "(other)").sum() == 120 - MOST_GROUPS + 1
    assert (groups == "g120").sum() == 80


def test_fields_are_read_from_the_shards_and_long_values_are_no_groups(tmp_path: Path) -> None:
    posts = [
        {"id": "a", "text": "t", "labels": {}, "region": "EU", "meta": {"topic": {"name": "x"}, "rank": 3}},
        {"id": "b", "text": "t", "labels": {}, "meta": {"topic": "n" * 65}, "created_at": "2026-03-04T01:00:00Z"},
    ]
    config = make_config(write_lines(tmp_path / "p.jsonl", [{**post, "split": "test"} for post in posts]))
    build(config, tmp_path)
    reader = ShardReader([ShardFolder.open(str(tmp_path / "shards"), config.data.cache)], "test")
    names = ["region", "modality", "meta.rank", "meta.topic.name", "meta.topic", "created_at+language"]
    fields = read_fields(reader, range(len(reader)), names)
    assert fields["a"] == {
        "modality": "text",
        "region": "EU",
        "meta.rank": "3",
        "meta.topic.name": "x",
        "meta.topic": "(other)",
        "created_at": "(none)",
    }
    assert [fields["b"][name] for name in ("region", "meta.topic", "created_at")] == ["(none)", "(other)", "2026-03"]


@pytest.mark.parametrize("name", ["text", "regoin", "meta", "region+id", "id"])
def test_what_cannot_be_a_slice_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="evaluation.slices"):
        EvaluationConfig(slices=[name])


@pytest.mark.parametrize("apart", [0.0, 1.0, 9.0])
def test_the_fast_metrics_are_those_of_scikit_learn(apart: float) -> None:
    labels, scores = draw_scores(500, 0.3, apart, seed=3)
    positives, negatives = grouped(labels, scores)
    assert (positives.sum(), negatives.sum()) == (labels.sum(), (1 - labels).sum())
    found = ranking_metrics(positives[None], negatives[None], 0.9)
    assert found["average_precision"][0] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    assert found["auroc"][0] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert found["recall_at_precision_90"][0] == pytest.approx(recall_at_precision(labels, scores), abs=1e-12)


def test_intervals_cover_what_they_promise() -> None:
    labels, scores = draw_scores(200_000, 0.2, 1.2, seed=0)
    truth = {"average_precision": average_precision_score(labels, scores), "auroc": roc_auc_score(labels, scores)}
    draw, hits = np.random.default_rng(1), dict.fromkeys(truth, 0)
    for number in range(200):
        rows = draw.integers(0, len(labels), 300)
        found = ranking_intervals(labels[rows], scores[rows], 0.9, number, resamples=300)
        for name, value in truth.items():
            hits[name] += found[name][0] <= value <= found[name][1]
    assert 0.88 * 200 <= hits["average_precision"] <= 0.99 * 200
    assert 0.92 * 200 <= hits["auroc"] <= 0.99 * 200


def test_exact_intervals_at_the_edges() -> None:
    assert proportion_interval(0, 20)[0] == 0
    assert proportion_interval(0, 20)[1] == pytest.approx(1 - 0.025 ** (1 / 20))
    assert proportion_interval(20, 20) == pytest.approx((0.025 ** (1 / 20), 1))
    assert proportion_interval(0, 0) == (0, 1)
    low, high = auroc_interval(1.0, 10, 10)
    assert (0.6 < low < 0.9, high) == (True, 1.0)
    assert auroc_interval(0.0, 10, 10) == pytest.approx((0.0, 1 - low))


def test_a_gap_of_false_positives_is_found_and_chance_is_none() -> None:
    draw = np.random.default_rng(0)
    labels, scores = draw_scores(4000, 0.3, 1.0, seed=5)
    fair = draw.choice(["a", "b"], 4000).astype(object)
    unfair = np.where((labels == 0) & (scores > 1.5), "a", fair).astype(object)
    rare = np.array(["a"] * 3995 + ["b"] * 5, dtype=object)
    found = false_positive_gaps(labels, scores, {"fair": fair, "unfair": unfair, "rare": rare}, 20)
    assert set(found["by"]) == {"fair", "unfair"}
    benign = scores[labels == 0]
    assert (benign > found["threshold"]).mean() == pytest.approx(0.05, abs=0.005)
    assert found["by"]["fair"]["interval"][0] == 0
    gap = found["by"]["unfair"]
    assert (gap["highest"], gap["lowest"], gap["groups"]["b"]["rate"]) == ("a", "b", 0)
    assert gap["interval"][0] > 0.05 < gap["gap"] < gap["interval"][1]
    assert false_positive_gaps(labels[:10], scores[:10], {"fair": fair[:10]}, 20) == {}

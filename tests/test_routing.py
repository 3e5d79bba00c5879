"""Routing and suites: what people mend when they see some posts, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score
from test_metrics import make_predictions

from crossguard.configs.schema import EvaluationConfig
from crossguard.train.evaluation.report_errors import MOST_ERRORS, worst_errors
from crossguard.train.evaluation.routing import BUDGETS, cascade_curve, measure_routing, review_curves
from crossguard.train.evaluation.suite import best_thresholds, measure_suite


def test_each_point_is_what_counting_gives() -> None:
    draw = np.random.default_rng(0)
    probabilities = draw.random(200)
    labels = (draw.random(200) < probabilities**2).astype(int)
    found = review_curves(labels, probabilities, 1.0, 3.0)
    ranks = {
        "score": probabilities,
        "uncertainty": -np.abs(probabilities - 0.5),
        "cost": np.minimum(1 - probabilities, 3 * probabilities),
    }
    for name, rank in ranks.items():
        for place, share in enumerate(BUDGETS):
            seen = np.zeros(200, dtype=bool)
            seen[np.argsort(-rank, kind="stable")[: round(share * 200)]] = True
            acted = np.where(seen, labels == 1, 3 * probabilities > 1 - probabilities)
            one = found["orders"][name]
            assert one["recall"][place] == (acted & (labels == 1)).sum() / labels.sum()
            if acted.any():
                assert one["precision"][place] == labels[acted].mean()
            missed, false = (~acted & (labels == 1)).sum(), (acted & (labels == 0)).sum()
            assert one["cost"][place] == pytest.approx((false + 3 * missed) / 200)
        assert (one["recall"][-1], one["precision"][-1], one["cost"][-1]) == (1, 1, 0)


def test_the_best_order_is_measured() -> None:
    draw = np.random.default_rng(1)
    probabilities = draw.beta(0.5, 0.5, 4000)
    labels = (draw.random(4000) < probabilities).astype(int)
    assert review_curves(labels, probabilities, 1.0, 1.0)["best"] in ("uncertainty", "cost")
    assert review_curves(labels, probabilities, 1.0, 50.0)["best"] == "cost"
    # Probabilities that mean nothing in the middle: there, the highest scores are the ones to see.
    wrong = np.where(labels == 1, 0.4 + 0.05 * draw.random(4000), 0.2 * draw.random(4000))
    assert review_curves(labels, wrong, 1.0, 1.0)["orders"]["score"]["recall"][5] > 0.35


def test_a_cascade_ranks_what_it_never_sees_last() -> None:
    draw = np.random.default_rng(2)
    labels = (draw.random(500) < 0.2).astype(int)
    cheap, costly = draw.normal(size=500) + labels, draw.normal(size=500) + 3 * labels
    found = cascade_curve(labels, cheap, costly, 0.25)
    assert found["cost"] == [0.25 + share for share in found["shares"]]
    assert found["average_precision"][-1] == pytest.approx(average_precision_score(labels, costly))
    place = found["shares"].index(0.2)
    seen = np.argsort(-cheap, kind="stable")[:100]
    assert found["recall"][place] == labels[seen].sum() / labels.sum()
    assert found["average_precision"][place] < found["average_precision"][-1]
    assert (np.diff(found["recall"]) >= 0).all()


def test_few_labels_and_other_posts_are_left_out() -> None:
    posts = make_predictions(300)
    posts.labels[:, 1] = np.where(np.arange(300) < 3, 1, 0)
    others = {"same": posts, "other": posts.take(np.arange(299))}
    found = measure_routing(posts, posts.scores, others, {"same": 0.5}, EvaluationConfig())
    assert set(found) == {"hate"}
    assert set(found["hate"]["cascade"]) == {"same"}
    assert found["hate"]["cascade"]["same"]["cost"][-1] == 1.5
    found = measure_routing(posts, posts.scores, others, {}, EvaluationConfig())
    assert found["hate"]["cascade"]["same"]["cost"][-1] == 1.0
    assert measure_routing(posts.take([]), posts.scores[:0], {}, {}, EvaluationConfig()) == {}


def test_a_suite_is_decided_where_validation_has_its_best_f1() -> None:
    posts = make_predictions(300)
    thresholds = best_thresholds(posts, 5)
    labels, scores = posts.labels[:, 0], posts.scores[:, 0]
    known = ~np.isnan(labels)
    values = {t: f1_score(labels[known] >= 0.5, scores[known] >= t) for t in np.unique(scores)}
    assert values[thresholds["hate"]] == max(values.values())
    assert best_thresholds(posts.take(np.arange(5)), 5) == {}
    fields = {
        "meta.functionality": np.array(["slur", "quote", "(none)"] * 100, dtype=object),
        "meta.target": np.array(["(none)"] * 300, dtype=object),
    }
    cases = replace(posts, fields=fields)
    found = measure_suite([cases.take(np.arange(100)), cases.take(np.arange(100, 300))], "s", thresholds)
    hate = found["policies"]["hate"]
    slurs = known & (fields["meta.functionality"] == "slur")
    passed = (scores >= thresholds["hate"]) == (labels >= 0.5)
    assert hate["by_functionality"]["slur"]["passed"] == passed[slurs].sum()
    assert set(hate["by_functionality"]) == {"slur", "quote"}
    assert hate["by_target"] == {}
    assert measure_suite([cases], "s", {})["policies"]["hate"]["threshold"] == 0.5


def test_the_worst_errors_are_named_by_id() -> None:
    posts = make_predictions(300)
    found = {(one["policy"], one["kind"]): one["posts"] for one in worst_errors(posts, None)}
    assert len(found) == 4
    for (policy, kind), named in found.items():
        column = posts.policies.index(policy)
        labels = posts.labels[:, column]
        rows = labels >= 0.5 if kind == "violating" else labels < 0.5
        scores = np.sort(posts.scores[rows, column])
        expected = scores[:MOST_ERRORS] if kind == "violating" else scores[::-1][:MOST_ERRORS]
        assert [post["score"] for post in named] == expected.tolist()
    assert worst_errors(posts.take([]), None) == []

"""Calibration: probabilities that mean what they say in every language, also where training's sampling moved them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build_job import build, make_config, write_lines
from sklearn.metrics import brier_score_loss, log_loss

from crossguard.configs.schema import EvaluationConfig
from crossguard.configs.schema.loss import LogitAdjustmentConfig
from crossguard.configs.schema.mixing import MixingConfig, WeightChange
from crossguard.data.shards.folder import ShardFolder
from crossguard.train.evaluation.calibration import (
    METHODS,
    Calibrator,
    _fit_line,
    _Posts,
    fit_calibrator,
    logits,
    sigmoid,
)
from crossguard.train.evaluation.decided import measure_calibration
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.reliability import diagram, reliability
from crossguard.train.evaluation.sampling_prior import Shifts, Trained, sampling_shifts

# Language -> labels, and how its logits are off: slope and intercept.
LANGUAGES = {
    "en": (3000, 1.0, 0.0),
    "de": (1500, 1.0, 0.2),
    "fr": (800, 1.1, -0.3),
    "ar": (1000, 0.8, 1.8),
    "hi": (300, 1.3, -1.6),
    "it": (300, 1.0, 0.1),
    "sw": (20, 1.0, 0.0),
}
Posts = tuple[np.ndarray, np.ndarray, np.ndarray]


def draw_posts(sizes: dict[str, int], seed: int, prevalence: float = 0.25) -> Posts:
    """(labels, scores, languages) of a model that is right but for a line over its logits."""
    draw = np.random.default_rng(seed)
    labels, scores, languages = [], [], []
    for language, count in sizes.items():
        own = (draw.random(count) < prevalence).astype(int)
        seen = draw.normal(size=count) + 2 * own
        truth = 2 * seen - 2 + np.log(prevalence / (1 - prevalence))
        _, slope, intercept = LANGUAGES[language]
        labels.append(own)
        scores.append(sigmoid(slope * truth + intercept))
        languages += [language] * count
    return np.concatenate(labels), np.concatenate(scores), np.array(languages, dtype=object)


def errors(posts: Posts, calibrator: Calibrator) -> dict[str, float]:
    labels, scores, languages = posts
    found = calibrator(scores, languages)
    return {name: reliability(labels[languages == name], found[languages == name])["ece"] for name in LANGUAGES}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_worst_language_is_calibrated_and_no_other_pays_for_it(seed: int) -> None:
    fitted = fit_calibrator(*draw_posts({name: spec[0] for name, spec in LANGUAGES.items()}, seed), {})
    unseen = draw_posts(dict.fromkeys(LANGUAGES, 10_000), 100 + seed)
    pooled, own = errors(unseen, Calibrator("platt", fitted.policy)), errors(unseen, fitted)
    large = [name for name, spec in LANGUAGES.items() if spec[0] >= 300]
    assert max(pooled[name] for name in large) >= 0.15
    assert own["ar"] <= 0.03
    # With 300 labels the share of violations itself is known to within .025 only.
    assert max(own[name] for name in large) <= 0.05
    assert all(own[name] <= pooled[name] + 0.015 for name in large)


def test_where_languages_are_alike_a_few_labels_are_not_believed_against_all_others() -> None:
    sizes = {"en": 2000, "de": 1000, "it": 400, "sw": 20}
    unseen = draw_posts({"sw": 10_000}, 99)
    found = []
    for seed in range(8):
        fitted = fit_calibrator(*draw_posts(sizes, seed), {})
        found.append(reliability(unseen[0], fitted(*unseen[1:]))["ece"])
    # Twenty labels alone would leave an error of about .08.
    assert np.mean(found) <= 0.03


def test_languages_that_differ_a_little_are_pooled_in_part() -> None:
    draw = np.random.default_rng(0)
    names = [f"l{number}" for number in range(30)]
    offsets = dict(zip(names, 0.8 * draw.normal(size=30), strict=True))

    def posts_of(count: int) -> Posts:
        languages = np.repeat(np.array(names, dtype=object), count)
        truth = draw.normal(size=len(languages)) * 1.5 - 1
        labels = (draw.random(len(languages)) < sigmoid(truth)).astype(int)
        return labels, sigmoid(truth + np.array([offsets[name] for name in languages])), languages

    labels, scores, languages = posts_of(60)
    unseen_labels, unseen, strange = posts_of(1000)

    def loss(calibrator: Calibrator) -> float:
        return float(log_loss(unseen_labels, calibrator(unseen, strange)))

    fitted = fit_calibrator(labels, scores, languages, {}, "platt")
    posts = _Posts.of(labels, scores, languages, {})
    alone = {
        name: _fit_line(posts.logits[rows], labels[rows], (1.0, 0.0), 1e-6, posts, True)
        for name, rows in posts.rows.items()
    }
    assert loss(fitted) < loss(Calibrator("platt", fitted.policy)) - 0.005
    assert loss(fitted) < loss(Calibrator("platt", fitted.policy, alone)) - 0.002


def test_a_language_without_labels_gets_the_policy_s_map() -> None:
    labels, scores, languages = draw_posts({"en": 2000, "de": 2000}, 0)
    fitted = fit_calibrator(labels, scores, languages, {})
    strange = np.array(["xx"] * len(scores), dtype=object)
    expected = Calibrator(fitted.method, fitted.policy, knots=fitted.knots)(scores, languages)
    np.testing.assert_array_equal(fitted(scores, strange), expected)


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_map_keeps_the_order_and_survives_json(method: str) -> None:
    posts = draw_posts({"en": 400, "hi": 300}, 3)
    fitted = fit_calibrator(*posts, {"hi": 0.7}, method)
    assert fitted.method == method
    assert Calibrator.from_json(fitted.to_json()) == fitted
    for language in ("en", "hi", "xx"):
        scores = np.linspace(0, 1, 101)
        found = fitted(scores, np.array([language] * 101, dtype=object))
        assert (np.diff(found) >= 0).all()
        assert 0 < found[1] < found[-2] < 1


def test_scores_that_are_right_are_left_alone_and_a_bend_needs_isotonic_regression() -> None:
    labels, scores, languages = draw_posts({"en": 4000}, 4)
    assert fit_calibrator(labels, scores, languages, {}).method == "temperature"
    bent = np.where(scores > 0.5, 0.5 + (scores - 0.5) ** 9, scores**0.2 / 2)
    fitted = fit_calibrator(labels, bent, languages, {})
    assert fitted.method == "isotonic"
    assert reliability(labels, fitted(bent, languages))["ece"] < 0.02


def test_scores_against_the_labels_become_flat_not_turned_around() -> None:
    labels, scores, languages = draw_posts({"en": 1000}, 5)
    fitted = fit_calibrator(labels, 1 - scores, languages, {}, "platt")
    found = fitted(1 - scores, languages)
    assert found.std() < 0.01
    assert found.mean() == pytest.approx(labels.mean(), abs=0.02)


def test_calibration_error_without_the_part_of_chance() -> None:
    draw = np.random.default_rng(0)
    plain, debiased, off = [], [], []
    for _ in range(100):
        scores = draw.beta(0.5, 2, 300)
        labels = (draw.random(300) < scores).astype(int)
        found = reliability(labels, scores)
        assert found["brier"] == brier_score_loss(labels, scores)
        plain.append(found["ece"])
        debiased.append(found["ece_debiased"])
        off.append(reliability((draw.random(300) < np.clip(scores + 0.2, 0, 1)).astype(int), scores)["ece_debiased"])
    assert np.mean(plain) > 0.045
    assert np.mean(debiased) < 0.015
    assert np.mean(off) == pytest.approx(0.2, abs=0.02)
    points = diagram(labels, scores)
    assert sum(point["n"] for point in points) == 300
    assert sum(point["n"] * point["rate"] for point in points) == pytest.approx(labels.sum())
    assert reliability(np.array([1]), np.array([0.3]))["ece"] == pytest.approx(0.7)


def test_sampling_that_evened_out_strata_is_taken_off(tmp_path: Path) -> None:
    posts = []
    for language, kinds in {"de": (180, 20), "en": (300, 300), "fr": (50, 0)}.items():
        for label, count in enumerate(kinds):
            posts += [
                {"id": f"{language}{label}{number}", "text": "t", "language": language, "labels": {"hate": label}}
                for number in range(count)
            ]
    config = make_config(write_lines(tmp_path / "p.jsonl", [{**post, "split": "train"} for post in posts]))
    build(config, tmp_path)
    folders = {"own": ShardFolder.open(str(tmp_path / "shards"), config.data.cache)}
    policies = config.taxonomy.policies
    names = tuple(policy.name for policy in policies)
    column = names.index("hate")
    labels = np.full((40, len(names)), np.nan, dtype=np.float32)
    labels[:, column] = np.arange(40) % 2
    ids = [str(number) for number in range(40)]
    labeled = Predictions(names, ids, ["de"] * 40, np.full((40, len(names)), 0.5), labels)

    def shifts_of(step: int = 1, **mixing: Any) -> Shifts:
        # As a checkpoint has it: plain values.
        plain = asdict(MixingConfig(**mixing)), asdict(LogitAdjustmentConfig())
        trained = Trained.of(
            {"data": {"mixing": plain[0]}, "train": {"loss": {"logit_adjustment": plain[1]}}}, tmp_path, step
        )
        return sampling_shifts(folders, trained, folders["own"].manifest.rarity, labeled)

    assert shifts_of() == {}
    shifts = shifts_of(temperature=1e6, max_repeats=1e6)
    # Both strata of a language come equally often: what was 1 in 10 is 1 in 2.
    assert shifts == {"hate": {"de": pytest.approx(np.log(9), rel=1e-4)}}
    truth = sigmoid(np.linspace(-4, 2, 50))
    moved = sigmoid(logits(truth) + shifts["hate"]["de"])
    identity = Calibrator("platt", (1.0, 0.0), shifts=shifts["hate"])
    np.testing.assert_allclose(identity(moved, np.array(["de"] * 50, dtype=object)), truth, rtol=1e-6)
    # Mixed in are posts of which none is benign: where they come to count more, it is the last weights that count.
    violating = [post for post in posts if post["labels"]["hate"]]
    more = make_config(write_lines(tmp_path / "v.jsonl", [{**post, "split": "train"} for post in violating]))
    build(more, tmp_path / "more")
    folders["more"] = ShardFolder.open(str(tmp_path / "more" / "shards"), config.data.cache)
    mixed: dict[str, Any] = {
        "datasets": {"more": "elsewhere"},
        "weights": {"own": 1.0, "more": 0.0},
        "changes": [WeightChange(after_step=10, weights={"own": 1.0, "more": 1.0})],
    }
    assert shifts_of(10, **mixed)["hate"]["de"] == pytest.approx(0, abs=1e-9)
    assert shifts_of(11, **mixed)["hate"]["de"] > 1


def test_every_slice_has_its_errors_and_small_ones_say_so() -> None:
    labels, scores, languages = draw_posts({"en": 400, "ar": 400, "sw": 20}, 7)
    ids = [str(number) for number in range(len(labels))]
    fields = {"region": np.where(np.arange(len(labels)) % 2, "EU", "US").astype(object)}
    posts = Predictions(
        ("hate",), ids, list(languages), scores[:, None], labels[:, None].astype(np.float32), fields=fields
    )
    calibrated = fit_calibrator(labels, scores, languages, {})(scores, languages)[:, None]
    found = measure_calibration(posts, calibrated, EvaluationConfig(slices=["region"]))["hate"]
    assert set(found["by_slice"]) == {"language", "region"}
    assert found["by_slice"]["language"]["sw"] == {"n": 20, "positives": int(labels[-20:].sum()), "insufficient": True}
    arabic = found["by_slice"]["language"]["ar"]
    assert arabic["raw"]["ece"] > 0.15 > 0.05 > arabic["calibrated"]["ece"]
    eu = fields["region"] == "EU"
    assert found["by_slice"]["region"]["EU"]["raw"] == reliability(labels[eu], scores[eu])
    assert found["worst_language"]["language"] in ("en", "ar")

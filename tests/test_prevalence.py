"""Prevalence: an estimate without bias, an interval that holds at one in a thousand, and the two commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossguard.configs.errors import UserError
from crossguard.recipes.cli import main
from crossguard.train.evaluation.calibration import sigmoid
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.prevalence import Design, estimate

POSTS, PREVALENCE, DRAWS = 100_000, 0.001, 300


def population(seed: int, apart: float = 3.3, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """(labels, probabilities) of posts; with a shift the probabilities are wrong."""
    draw = np.random.default_rng(seed)
    labels = (draw.random(POSTS) < PREVALENCE).astype(int)
    seen = draw.normal(size=POSTS) + apart * labels
    truth = apart * seen - apart**2 / 2 + np.log(PREVALENCE / (1 - PREVALENCE))
    return labels, sigmoid(truth + shift)


def labeled(rows: np.ndarray, known: list[dict[str, Any]], labels: np.ndarray) -> list[dict[str, Any]]:
    return [{**about, "label": int(labels[row])} for row, about in zip(rows, known, strict=True)]


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_at_one_in_a_thousand_the_interval_holds_and_the_variance_is_a_quarter_at_most(shift: float) -> None:
    found, covered, count = [], 0, 0
    for seed in range(DRAWS // 30):
        labels, probabilities = population(seed, shift=shift)
        design = Design.of(probabilities, 2000)
        for again in range(30):
            rows, known = design.draw(again)
            one = estimate(labeled(rows, known, labels))
            found.append(one["prevalence"] / labels.mean())
            covered += one["interval"][0] <= labels.mean() <= one["interval"][1]
            count += len(rows)
    uniform = (1 - PREVALENCE) / PREVALENCE / (count / DRAWS)
    assert np.mean(found) == pytest.approx(1, abs=3 * np.std(found) / np.sqrt(DRAWS))
    assert uniform / np.var(found) >= 4
    # 95 %, with the error of so many draws.
    assert 0.93 - 0.01 <= covered / DRAWS <= 0.97 + 0.015


def test_scores_that_mean_nothing_cost_precision_and_no_truth() -> None:
    draw = np.random.default_rng(0)
    labels = (draw.random(20_000) < 0.02).astype(int)
    probabilities = draw.beta(0.5, 20, 20_000)
    found = []
    design = Design.of(probabilities, 1000)
    for seed in range(200):
        rows, known = design.draw(seed)
        found.append(estimate(labeled(rows, known, labels)))
    mean = np.mean([one["prevalence"] for one in found])
    assert mean == pytest.approx(labels.mean(), abs=4 * np.std([one["prevalence"] for one in found]) / np.sqrt(200))
    assert np.mean([one["interval"][0] <= labels.mean() <= one["interval"][1] for one in found]) >= 0.92


def test_views_count_what_people_see() -> None:
    draw = np.random.default_rng(1)
    views = draw.lognormal(0, 1, 20_000)
    labels = (draw.random(20_000) < 0.05).astype(int)
    labels[views > np.quantile(views, 0.9)] = 0
    probabilities = np.clip(0.03 + 0.3 * labels + 0.01 * draw.random(20_000), 0, 1)
    truth = (views * labels).sum() / views.sum()
    design = Design.of(probabilities, 1500, views)
    found = [estimate(labeled(*design.draw(seed), labels))["prevalence"] for seed in range(100)]
    assert np.mean(found) == pytest.approx(truth, abs=4 * np.std(found) / 10)
    assert truth < 0.8 * labels.mean()


def test_no_violation_at_all_still_has_an_upper_bound_and_unknown_labels_are_left_out() -> None:
    labels, probabilities = population(3)
    rows, known = Design.of(probabilities, 1000).draw(0)
    sample = labeled(rows, known, np.zeros_like(labels))
    found = estimate(sample)
    assert (found["prevalence"], "variance_of_uniform" in found) == (0, False)
    assert 0 <= found["interval"][0] < found["interval"][1] < 0.01
    fewer = [{**one, "label": None} if number % 3 == 0 else one for number, one in enumerate(sample)]
    assert estimate(fewer)["labels"] == len([one for one in fewer if one["label"] is not None])
    silent = [{**one, "label": None} if one["stratum"] == 0 else one for one in sample]
    with pytest.raises(UserError, match="1 strata of the sample have no label"):
        estimate(silent)
    with pytest.raises(UserError, match="posts=39"):
        Design.of(probabilities, 39)
    # Where everything is labeled nothing is left to chance.
    rows, known = Design.of(probabilities[:200], 200).draw(0)
    everything = [{**one, "size": 1} for one in known[:1]]
    assert estimate([{**everything[0], "label": 1, "share": 1.0}])["interval"] == [1.0, 1.0]


def test_the_two_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels, probabilities = population(5)
    labels, probabilities = labels[:5000], probabilities[:5000]
    ids = [f"p{number}" for number in range(5000)]
    file, sample = tmp_path / "scores.parquet", tmp_path / "sample.jsonl"
    unknown = np.full((5000, 1), np.nan, np.float32)
    Predictions(("spam",), ids, ["en"] * 5000, probabilities[:, None], unknown).write(file)

    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(["prevalence", *arguments])
        return int(ended.value.code or 0)

    assert run("draw", str(file), "policy=spam", "posts=500", f"output={sample}") == 0
    lines = [json.loads(line) for line in sample.read_text().splitlines()]
    assert f"{len(lines)} of 5,000 posts to label" in capsys.readouterr().out
    assert 400 < len(lines) <= 540
    assert len({line["id"] for line in lines}) == len(lines)
    for line in lines:
        line["label"] = int(labels[int(line["id"][1:])])
    sample.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run("estimate", str(sample)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["interval"][0] <= labels.mean() <= found["interval"][1]
    sample.write_text(sample.read_text().replace('"label": 0', '"label": "no"', 1))
    for arguments, message in (
        (("estimate", str(sample)), "sample.jsonl:1: label: must be 1, 0, a fraction or null"),
        (("estimate", str(file.with_name("none"))), "unreadable"),
        (("draw", str(sample), "policy=spam", "posts=100"), "no table of predictions"),
        (("draw", str(file), "policy=spma", "posts=100"), "did you mean 'spam'"),
        (("draw", str(file), "policy=spam", "posts=many"), "must be a whole number"),
        (("draw", str(file), "policy=spam", "posts=100", "views=seen"), "views=seen"),
        (("estimated",), "did you mean 'estimate'"),
    ):
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err

"""Comparing runs: paired differences, and a gate that finds what got worse and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_posts
from evaluation_job import ALONE, make_config, make_run
from sklearn.metrics import average_precision_score, roc_auc_score
from test_metrics import make_predictions

from crossguard.configs.errors import JobError, UserError
from crossguard.configs.schema import EvaluationConfig
from crossguard.recipes.artefacts import evaluated_on
from crossguard.recipes.cli import main
from crossguard.recipes.job import Job
from crossguard.recipes.work import _check_not_worse
from crossguard.train.evaluation.compare import compare, paired_differences
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.stage import run_evaluation

CONFIG = EvaluationConfig(min_positives=5, slices=["region"])


def scored(seed: int = 0, count: int = 900) -> Predictions:
    """A model that is right to a degree, on posts with a region."""
    predictions = make_predictions(count)
    draw = np.random.default_rng(seed)
    right = np.nan_to_num(predictions.labels) >= 0.5
    scores = draw.normal(size=right.shape) + 2 * right
    region = np.random.default_rng(5).choice(["EU", "US"], count).astype(object)
    return replace(predictions, scores=1 / (1 + np.exp(-scores)), fields={"region": region})


def test_differences_are_paired_and_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    labels = (draw.random(800) < 0.3).astype(int)
    old = np.round(draw.normal(size=800) + labels, 1)
    new = old + draw.normal(size=800) * 0.05
    found = paired_differences(labels, new, old, seed=1)
    for name, metric in (("average_precision", average_precision_score), ("auroc", roc_auc_score)):
        assert found[name]["new"] == pytest.approx(metric(labels, new), abs=1e-6)
        assert found[name]["difference"] == pytest.approx(metric(labels, new) - metric(labels, old), abs=1e-6)
        assert found[name]["interval"][0] < found[name]["difference"] < found[name]["interval"][1]
    # Unpaired, two AUROCs of these posts would differ by several times as much.
    assert found["auroc"]["error"] < 0.01
    same = paired_differences(labels, old, old, seed=1)["auroc"]
    assert (same["difference"], same["interval"], same["error"]) == (0, [0, 0], 0)


def test_only_the_group_that_got_worse_is_named() -> None:
    old, new = scored(), scored()
    rows = new.fields["region"] == "US"
    new.scores[rows, 1] = np.random.default_rng(3).random(rows.sum())
    found = compare({"test": new}, {"test": old}, CONFIG)
    worse = {(one["policy"], one["slice"], one["group"]) for one in found["worse"]}
    assert ("spam", "region", "US") in worse
    assert {policy for policy, _, _ in worse} == {"spam"}
    assert ("spam", "region", "EU") not in worse
    better = compare({"test": old}, {"test": new}, CONFIG)
    assert better["worse"] == []
    assert compare({"test": new}, {"test": old}, replace(CONFIG, margin=1.0))["worse"] == []


def test_chance_is_not_called_worse() -> None:
    false_alarms = 0
    for seed in range(20):
        found = compare({"test": scored(seed, 300)}, {"test": scored(100 + seed, 300)}, replace(CONFIG, margin=0.0))
        false_alarms += bool(found["worse"])
    assert false_alarms <= 4


def test_posts_are_matched_by_their_ids_and_labels_are_the_new_ones() -> None:
    old = scored()
    new = old.take(np.arange(len(old))[::-2])
    found = compare({"test": new, "more": new}, {"test": old, "gone": old}, CONFIG)
    assert set(found["splits"]) == {"test"}
    assert found["splits"]["test"]["posts"] == 450
    assert {one["auroc"]["difference"] for one in found["splits"]["test"]["groups"]} == {0}
    unknown = replace(new, labels=np.full_like(new.labels, np.nan))
    assert compare({"test": unknown}, {"test": old}, CONFIG) == {
        "splits": {"test": {"posts": 450, "groups": []}},
        "worse": [],
    }
    with pytest.raises(UserError, match="no posts of a common policy"):
        compare({"test": new}, {"other": old}, CONFIG)
    with pytest.raises(UserError, match="no posts of a common policy"):
        compare({"test": new}, {"test": replace(old, policies=("a", "b"))}, CONFIG)


def test_an_evaluation_fails_where_it_is_worse_than_an_earlier_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(write_posts(tmp_path / "posts"), tmp_path / "run")
    config.evaluation.references = []
    make_run(config)
    run_evaluation(config, ALONE)
    earlier = tmp_path / "earlier" / "predictions"
    earlier.mkdir(parents=True)
    now = Predictions.read(tmp_path / "run" / "predictions" / "test.parquet")
    now.write(earlier / "test.parquet")
    config.evaluation.against = str(tmp_path / "earlier")
    job = Job(config, [])
    equal = evaluated_on(job)
    run_evaluation(config, ALONE)
    _check_not_worse(job)
    assert "no group is worse than in" in capsys.readouterr().out
    known = np.nan_to_num(now.labels, nan=0.5)
    replace(now, scores=0.1 + 0.8 * known + 0.05 * now.scores).write(earlier / "test.parquet")
    # Other predictions to compare with: the stage is not skipped.
    assert evaluated_on(job) != equal
    run_evaluation(config, ALONE)
    with pytest.raises(JobError, match=r"worse than .*earlier by more than evaluation.margin=0.02: test: "):
        _check_not_worse(job)
    page = (tmp_path / "run" / "report" / "report.html").read_text(encoding="utf-8")
    assert "Worse than the earlier run earlier by more than 0.02" in page
    assert str(tmp_path) not in (tmp_path / "run" / "report" / "metrics.json").read_text()
    config.evaluation.against = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="evaluation.against: .*nowhere"):
        evaluated_on(job)

    for arguments, status, said in (
        ([str(tmp_path / "earlier"), str(tmp_path / "run")], 0, "worse beyond the margin and beyond chance:"),
        ([str(tmp_path / "earlier")], 2, "got 1 folders"),
        ([str(tmp_path / "nowhere"), str(tmp_path / "run")], 2, "no predictions/ to compare with"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["report", "compare", *arguments])
        assert ended.value.code == status
        assert said in "".join(capsys.readouterr())
    with pytest.raises(SystemExit):
        main(["report", "compare", str(tmp_path / "earlier"), str(tmp_path / "run"), "--json"])
    assert json.loads(capsys.readouterr().out)["worse"]

"""Scoring and the evaluate stage: each post once, the same scores on any number of ranks, what is broken left out."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_posts
from evaluation_job import ALONE, add_ablation, make_config, make_run
from rank_models import run_ranks
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import Tensor, nn

from crossguard.configs.errors import JobError, UserError
from crossguard.configs.saved import save_config
from crossguard.configs.schema import Config
from crossguard.data.loading.collate import Batch, collate
from crossguard.data.loading.reader import ShardReader
from crossguard.data.shards.folder import ShardFolder
from crossguard.data.taxonomy import Taxonomy
from crossguard.train.checkpoint_folder import best_or_latest
from crossguard.train.encode import PostEncoder
from crossguard.train.evaluation.disguise import Disguise
from crossguard.train.evaluation.evasion import POINT
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.scoring import score_split
from crossguard.train.evaluation.stage import run_evaluation
from crossguard.train.ranks import Ranks
from crossguard.train.stored_weights import load_weights
from crossguard.train.trained import load_trained


class Counting(nn.Module):
    """A model that counts its forward passes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.passes = model, 0

    def forward(self, batch: Batch) -> Tensor:
        self.passes += 1
        logits: Tensor = self.model(batch)
        return logits


class RankOf(Ranks):
    """One of several ranks, played alone: it hears nothing from the others."""

    def any(self, value: bool) -> bool:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("scoring")
    config = make_config(write_posts(folder / "posts"), folder / "run")
    make_run(config)
    return config


def parts_of(config: Config, split: str) -> tuple[nn.Module, PostEncoder, ShardReader]:
    run_dir = Path(config.run_dir)
    encode = PostEncoder(config.model, Taxonomy.from_config(config.taxonomy))
    checkpoint = best_or_latest(run_dir)
    model = load_trained(config.model, encode, load_weights(checkpoint), checkpoint)
    return model, encode, ShardReader([ShardFolder.open(run_dir / "shards", config.data.cache)], split)


def score(config: Config, split: str, ranks: Ranks, count: int | None = None) -> tuple[Predictions, int]:
    """Predictions, and how many forward passes they took."""
    model, encode, reader = parts_of(config, split)
    counting, rows = Counting(model), np.arange(len(reader))[:count]
    predictions = score_split(counting, encode, reader, rows, ranks, 8, on_refused=pytest.fail)
    return predictions, counting.passes


def test_each_post_gets_the_score_that_it_gets_alone(config: Config) -> None:
    predictions, _ = score(config, "test", ALONE)
    model, encode, reader = parts_of(config, "test")
    assert predictions.ids == sorted(reader.read(row).id for row in range(len(reader)))
    for row in range(len(reader)):
        sample = encode(reader.read(row))
        batch = collate([sample], **encode.layout)
        place = predictions.ids.index(sample.id)
        with torch.no_grad():
            expected = torch.sigmoid(model(batch).double())[0].numpy()
        np.testing.assert_allclose(predictions.scores[place], expected, atol=1e-6)
        np.testing.assert_array_equal(predictions.labels[place], sample.labels)
    assert len(np.unique(predictions.scores[:, 0])) > len(reader) // 2


def test_under_a_condition_posts_are_changed_before_they_are_encoded(config: Config) -> None:
    model, encode, reader = parts_of(config, "test")
    disguise, rows = Disguise("homoglyphs", 7), np.arange(len(reader))
    changed = score_split(model, encode.under(disguise), reader, rows, ALONE, 8, on_refused=pytest.fail)
    plain, _ = score(config, "test", ALONE)
    raws = {raw.id: raw for raw in map(reader.read, rows.tolist())}
    samples = [encode(disguise(raws[post])) for post in changed.ids]
    with torch.no_grad():
        expected = torch.sigmoid(model(collate(samples, **encode.layout)).double()).numpy()
    np.testing.assert_allclose(changed.scores, expected, atol=1e-6)
    assert (np.abs(changed.scores - plain.scores).max(axis=1) > 1e-3).mean() > 0.5
    assert changed.ids == plain.ids


@pytest.mark.parametrize(("world_size", "count"), [(2, None), (3, None), (4, 5), (2, 0)])
def test_any_number_of_ranks_gives_the_same_digits_in_as_many_passes(
    config: Config, world_size: int, count: int | None
) -> None:
    alone, _ = score(config, "test", ALONE, count)
    ranks = [RankOf(rank, rank, world_size, torch.device("cpu")) for rank in range(world_size)]
    scored = [score(config, "test", rank, count) for rank in ranks]
    assert len({passes for _, passes in scored}) == 1
    assert sum(len(part) for part, _ in scored) == len(alone)
    joined = Predictions.gather(alone.policies, [part for part, _ in scored])
    assert joined.ids == alone.ids
    np.testing.assert_array_equal(joined.scores, alone.scores)


def test_scores_that_are_no_numbers_end_the_job(config: Config) -> None:
    model, encode, reader = parts_of(config, "test")
    nn.init.constant_(next(model.parameters()), float("nan"))
    with pytest.raises(JobError, match=r"48 posts are not finite, the first is 'post/19"):
        score_split(model, encode, reader, np.arange(len(reader)), ALONE, 8, on_refused=pytest.fail)


@pytest.fixture(scope="module")
def evaluated(config: Config) -> Config:
    """The run, evaluated on one rank with an ablation."""
    config.evaluation.attacks, config.evaluation.max_attacked_posts = ["swaps", "homoglyphs"], 30
    save_config(config, Path(config.run_dir) / "config.yaml")  # As the program on two ranks reads it.
    add_ablation(config, "text_only", ["text"])
    (Path(config.run_dir) / "ablations" / "never_trained").mkdir()
    run_evaluation(config, ALONE)
    return config


def test_the_stage_writes_what_the_contract_says(evaluated: Config) -> None:
    run_dir = Path(evaluated.run_dir)
    metrics = json.loads((run_dir / "report" / "metrics.json").read_text())
    assert set(metrics["splits"]) == {"validation", "test"}
    test = metrics["splits"]["test"]
    contract = {"policies", "macro", "macro_policy_language"}
    assert set(test) == contract | {"worst", "calibration", "actions", "routing"}
    assert set(metrics["decisions"]) == {"fitted_on", "promises", "calibration", "thresholds"}
    assert {"all", "by_language", "by_slice"} <= set(test["policies"]["spam"])
    assert set(test["policies"]["spam"]["by_slice"]["modality"]) == {"text", "image", "text+image"}
    assert {"n", "positives", "average_precision", "auroc"} <= set(test["policies"]["spam"]["all"])
    assert set(metrics["ablations"]) == {"text_only"}
    assert {"average_precision", "auroc"} <= set(metrics["ablations"]["text_only"]["macro"])
    assert {"average_precision", "auroc"} <= set(metrics["references"]["tfidf_logistic_regression"]["macro"])
    assert metrics["checkpoint"] == {"step": 3}
    costs = {name: one["cost"][-1] for name, one in test["routing"]["spam"]["cascade"].items()}
    assert costs["tfidf_logistic_regression"] == 1.0
    assert 1.05 < costs["text_only"] < 1.95
    for evasion in (metrics["evasion"], metrics["ablations"]["text_only"]["evasion"]):
        assert (evasion["split"], set(evasion["families"])) == ("test", {"swaps", "homoglyphs"})
        attacked = evasion["families"]["swaps"][POINT]["policies"]["spam"]["all"]["n"]
        assert 0 < attacked <= 30 < test["policies"]["spam"]["all"]["n"]
    for folder in (run_dir, run_dir / "ablations" / "text_only"):
        assert {file.name for file in (folder / "predictions").iterdir()} == {"validation.parquet", "test.parquet"}


def test_two_ranks_write_the_same_bytes_as_one(evaluated: Config, tmp_path: Path) -> None:
    run_dir = Path(evaluated.run_dir)
    names = ["report/metrics.json", "predictions/test.parquet", "ablations/text_only/predictions/test.parquet"]
    before = {name: (run_dir / name).read_bytes() for name in names}
    for name in names:
        (run_dir / name).unlink()
    run_ranks(2, Path(__file__).with_name("evaluation_job.py"), str(run_dir))
    assert {name: (run_dir / name).read_bytes() for name in names} == before
    # And they are scikit-learn's on one, to the last digit.
    scored = Predictions.read(run_dir / "predictions" / "test.parquet")
    measured = json.loads((run_dir / "report" / "metrics.json").read_text())["splits"]["test"]["policies"]
    for column, policy in enumerate(scored.policies):
        for language in ("all", *sorted(set(scored.languages))):
            cells = measured[policy]
            cell = cells["all"] if language == "all" else cells["by_language"][language]
            rows = ~np.isnan(scored.labels[:, column]) & (
                np.array([language in ("all", own) for own in scored.languages])
            )
            labels, scores = scored.labels[rows, column] >= 0.5, scored.scores[rows, column]
            assert cell["n"] == rows.sum()
            if "insufficient" not in cell:
                assert cell["auroc"] == roc_auc_score(labels, scores)
                assert cell["average_precision"] == average_precision_score(labels, scores)
                precision, recall, _ = precision_recall_curve(labels, scores)
                assert cell["recall_at_precision_90"] == recall[precision >= 0.9].max()


def test_posts_that_cannot_be_read_are_left_out_and_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(write_posts(tmp_path / "posts"), tmp_path / "run")
    make_run(config)
    shard = next((tmp_path / "run" / "shards" / "test").glob("*.tar"))
    data, stamp = bytearray(shard.read_bytes()), shard.stat()
    data[600] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as a disk would: silently
    for _ in range(2):
        run_evaluation(config, ALONE)
    lines = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["split"], line["stage"]) for line in lines] == [("test", "evaluate")]
    assert "damaged" in lines[0]["reason"]
    assert len(Predictions.read(tmp_path / "run" / "predictions" / "test.parquet")) == 47
    assert "1 posts cannot be read" in capsys.readouterr().err


def test_what_cannot_be_evaluated_is_one_clear_error(config: Config, tmp_path: Path) -> None:
    evaluation = replace(config.evaluation, splits=["tset"])
    with pytest.raises(UserError, match="no split 'tset' in the shards; did you mean 'test'"):
        run_evaluation(replace(config, evaluation=evaluation), ALONE)
    wider = replace(config.model, fusion=replace(config.model.fusion, width=32))
    with pytest.raises(UserError, match="trained with another configuration: model.fusion.width: was 16, is now 32"):
        run_evaluation(replace(config, model=wider), ALONE)
    data = replace(config.data, shards=str(Path(config.run_dir) / "shards"))
    with pytest.raises(UserError, match="no checkpoint"):
        run_evaluation(replace(config, run_dir=str(tmp_path / "fresh"), data=data), ALONE)

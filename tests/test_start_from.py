"""A new policy on an earlier run's trunk: only its own head is trained, and the old policies score as before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_posts
from embeddings_job import TRUNK, blocks, job, weights_of
from evaluation_job import ALONE, MODEL, POLICIES
from rank_models import alone

from crossguard.configs.errors import UserError
from crossguard.configs.schema import Config
from crossguard.configs.schema.encoders import NORMALISERS
from crossguard.configs.schema.heads import HeadConfig
from crossguard.configs.schema.model import ModelConfig
from crossguard.configs.schema.taxonomy import PolicyConfig, TaxonomyConfig
from crossguard.data.shards.build import build_shards
from crossguard.train.checkpoint_folder import best_or_latest, latest_checkpoint
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.stage import run_evaluation
from crossguard.train.export.bundle import load_bundle, write_bundle
from crossguard.train.export.predict import predict
from crossguard.train.stored_weights import load_weights
from crossguard.train.training import run_training


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run with two policies, on posts that know a third."""
    folder = tmp_path_factory.mktemp("start")
    file = write_posts(folder / "posts", 120)
    build_shards(job(folder, "build"), folder / "shards", folder / "quarantine.jsonl")
    config = job(folder, "earlier", ema_decay=0.5)
    run_training(config, alone())
    run_evaluation(config, ALONE)
    write_bundle(config, Path(config.run_dir))
    posts = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for number, post in enumerate(posts):
        post["labels"]["scam"] = number % 2
    file.write_text("".join(json.dumps(post) + "\n" for post in posts), encoding="utf-8")
    return config


def with_scam(earlier: Config, name: str, start_from: Path, **train: object) -> Config:
    """The next job: one more policy, in front of the others, with a head of its own."""
    folder = Path(earlier.run_dir).parent
    heads = {"old": HeadConfig(["spam", "insult"]), "new": HeadConfig(["scam"])}
    settings = {
        "freeze": [*TRUNK, "heads.old"],
        "cache_embeddings": True,
        "max_steps": 12,
        "schedule_steps": 20,
        **train,
    }
    config = job(folder, name, **settings)
    return replace(
        config,
        taxonomy=TaxonomyConfig(name="small", version="2", policies=[PolicyConfig(name="scam"), *POLICIES]),
        model=replace(MODEL, heads=heads, start_from=str(start_from)),
        data=replace(config.data, shards=str(folder / "shards-2")),
    )


@pytest.fixture(scope="module")
def started(earlier: Config) -> Config:
    """It has been trained, evaluated and exported."""
    config = with_scam(earlier, "started", Path(earlier.run_dir))
    build_shards(config, Path(str(config.data.shards)), Path(config.run_dir).parent / "quarantine.jsonl")
    run_training(config, alone())
    run_evaluation(config, ALONE)
    write_bundle(config, Path(config.run_dir))
    return config


def test_the_old_policies_score_bit_for_bit_as_before(earlier: Config, started: Config) -> None:
    before, after = (Predictions.read(Path(one.run_dir) / "predictions" / "test.parquet") for one in (earlier, started))
    assert list(after.policies) == ["scam", "spam", "insult"]
    assert before.ids == after.ids
    assert np.array_equal(before.scores, after.scores[:, 1:])
    assert before.scores.std() > 1e-3
    # The new one has learned something.
    assert after.scores[:, 0].std() > 1e-3
    assert len(blocks(started)) == 4


def test_one_bundle_has_old_and_new_policies(started: Config) -> None:
    bundle = Path(started.run_dir) / "bundle"
    assert load_bundle(bundle).taxonomy.names == ("scam", "spam", "insult")
    assert json.loads((bundle / "config.json").read_text())["model"]["start_from"] is None
    predict(bundle, started.data, Path(started.run_dir) / "all.parquet", batch_size=8)
    predicted = Predictions.read(Path(started.run_dir) / "all.parquet")
    evaluated = Predictions.read(Path(started.run_dir) / "predictions" / "test.parquet")
    rows = {post: row for row, post in enumerate(predicted.ids)}
    np.testing.assert_allclose(predicted.scores[[rows[post] for post in evaluated.ids]], evaluated.scores, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 3])
def test_runs_checkpoints_and_bundles_give_the_same_weights(
    earlier: Config, started: Config, stage: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the average of the weights, which is what was evaluated; an average of one's own begins there."""
    run_dir = Path(earlier.run_dir)
    trained = weights_of(earlier)
    for name, place in (("checkpoint", best_or_latest(run_dir)), ("bundle", run_dir / "bundle")):
        config = with_scam(earlier, f"{name}-{stage}", place, max_steps=1, ema_decay=0.5)
        run_training(replace(config, zero=replace(config.zero, stage=stage)), alone())
        said = capfd.readouterr().err
        assert f"begins with {place}: text, image, fusion, spam, insult; fresh: scam" in said
        weights = weights_of(config)
        assert not any("heads.main" in name for name in weights)
        for kind in ("weight", "bias"):
            assert torch.equal(weights[f"heads.old.logits.{kind}"], trained[f"heads.main.logits.{kind}"])
        trunk = [name for name in trained if not name.startswith("heads.")]
        assert all(torch.equal(weights[name], trained[name]) for name in trunk)


def test_a_resume_reads_its_own_checkpoint(started: Config, capfd: pytest.CaptureFixture[str]) -> None:
    longer = replace(started, train=replace(started.train, max_steps=14))
    run_training(replace(longer, model=replace(longer.model, start_from="/nowhere")), alone())
    assert "begins with" not in capfd.readouterr().err
    newest = latest_checkpoint(Path(started.run_dir))
    assert newest is not None
    assert newest.name == "step-00000014"
    weights, before = load_weights(newest), load_weights(newest.with_name("step-00000012"))
    moved = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert moved == {"heads.new.logits.weight", "heads.new.logits.bias"}


def changed(**text: object) -> ModelConfig:
    return replace(MODEL, text=replace(MODEL.text, **text))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "difference"),
    [
        (
            changed(config={**MODEL.text.config, "hidden_size": 32}),
            r"'text\.encoder\..*' is \[.*16.*\] there and \[.*32",
        ),
        (
            changed(config={**MODEL.text.config, "num_attention_heads": 4}),
            r"model\.text\.config\.num_attention_heads was 2",
        ),
        (changed(normaliser=NORMALISERS[-1]), r"model\.text\.normaliser was 0, is now \d"),
        (changed(prefix="query: "), r"model\.text\.prefix"),
        (replace(MODEL, fusion=replace(MODEL.fusion, kind="late")), r"'fusion\.\S*' is (absent|\[.*\]) there"),
    ],
)
def test_another_trunk_is_refused_with_the_first_difference(
    earlier: Config, model: ModelConfig, difference: str
) -> None:
    folder = Path(earlier.run_dir).parent
    config = job(folder, "refused", replace(model, start_from=earlier.run_dir))
    config.data.shards = str(folder / "shards")
    with pytest.raises(UserError, match=rf"model\.start_from=.*: of another model: {difference}"):
        run_training(config, alone())


def test_what_is_there_is_none_of_the_three(earlier: Config, tmp_path: Path) -> None:
    config = job(Path(earlier.run_dir).parent, "refused", replace(MODEL, start_from=str(tmp_path)))
    with pytest.raises(UserError, match="neither a run directory with checkpoints, nor a checkpoint, nor a bundle"):
        run_training(config, alone())


def test_a_modality_more_begins_fresh(earlier: Config, capfd: pytest.CaptureFixture[str]) -> None:
    """The encoder that both have is taken; of another fusion the heads would not understand a word."""
    folder = Path(earlier.run_dir).parent
    config = job(
        folder, "text", replace(MODEL, modalities=["text"], start_from=earlier.run_dir), max_steps=1, freeze=["text"]
    )
    run_training(config, alone())
    assert "text; fresh: fusion, spam, insult" in capfd.readouterr().err
    trained, weights = weights_of(earlier), weights_of(config)
    assert all(torch.equal(weights[name], trained[name]) for name in weights if name.startswith("text."))

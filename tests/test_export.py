"""Export and predict: a bundle that needs nothing else, and the scores of the evaluation from it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_posts
from evaluation_job import ALONE, TINY, make_config, make_run
from safetensors.torch import load_file

from crossguard.configs.errors import UserError
from crossguard.configs.schema import Config, DataConfig
from crossguard.configs.schema.actions import ActionConfig
from crossguard.configs.schema.encoders import TextEncoderConfig
from crossguard.train.checkpoint_folder import best_or_latest
from crossguard.train.evaluation.decisions import Decisions
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.stage import run_evaluation
from crossguard.train.export.bundle import load_bundle, write_bundle
from crossguard.train.export.predict import _locked, _workspace, predict
from crossguard.train.stored_weights import load_weights


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that was evaluated and exported."""
    folder = tmp_path_factory.mktemp("export")
    config = make_config(write_posts(folder / "posts"), folder / "run")
    config.evaluation.actions = {"look_at": ActionConfig(recall=0.5, delta=0.3)}
    make_run(config)
    run_evaluation(config, ALONE)
    write_bundle(config, folder / "run")
    return config


def bundle_of(config: Config) -> Path:
    return Path(config.run_dir) / "bundle"


def read_posts(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(str(config.data.path)).read_text(encoding="utf-8").splitlines()]


def predict_lines(config: Config, posts: list[dict[str, Any]], name: str) -> tuple[Predictions, str]:
    """What the bundle says about these posts, which lie beside the pictures of the run's own; and its last words."""
    file = Path(str(config.data.path)).with_name(f"{name}.jsonl")
    file.write_text("".join(json.dumps(post) + "\n" for post in posts), encoding="utf-8")
    output = file.with_suffix(".parquet")
    said = predict(bundle_of(config), DataConfig(path=str(file)), output, batch_size=7)
    return Predictions.read(output), said


def test_the_bundle_holds_whole_weights_and_no_absolute_path(config: Config) -> None:
    bundle = bundle_of(config)
    expected = {"model.safetensors", "config.json", "tokenizer", "taxonomy.json", "card.md", "manifest.json"}
    assert {file.name for file in bundle.iterdir()} == expected | {"decisions.json"}
    weights, trained = load_file(bundle / "model.safetensors"), load_weights(best_or_latest(Path(config.run_dir)))
    assert weights.keys() == trained.keys()
    assert all(torch.equal(weights[name], trained[name]) for name in trained)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values() if tensor.is_floating_point())
    for file in (path for path in bundle.rglob("*") if path.suffix in (".json", ".md")):
        assert str(Path(config.run_dir).parent) not in file.read_text(encoding="utf-8")


def test_predicting_gives_the_scores_of_the_evaluation(config: Config) -> None:
    output = Path(config.run_dir) / "all.parquet"
    said = predict(bundle_of(config), config.data, output, batch_size=5)
    assert said == f"240 posts -> {output}"
    predicted = Predictions.read(output)
    rows = {post: row for row, post in enumerate(predicted.ids)}
    for split in ("validation", "test"):
        evaluated = Predictions.read(Path(config.run_dir) / "predictions" / f"{split}.parquet")
        same = [rows[post] for post in evaluated.ids]
        np.testing.assert_allclose(predicted.scores[same], evaluated.scores, atol=1e-6)
        np.testing.assert_array_equal(predicted.labels[same], evaluated.labels)
        assert [predicted.languages[row] for row in same] == evaluated.languages
    assert not [path.name for path in output.parent.iterdir() if path.name.startswith((".predict", "all.parquet."))]


def test_predicting_decides_as_the_evaluation_s_thresholds_say(config: Config) -> None:
    output = Path(config.run_dir) / "decided.parquet"
    predict(bundle_of(config), config.data, output, batch_size=64)
    table, predicted = pq.read_table(output), Predictions.read(output)
    decisions = json.loads((Path(config.run_dir) / "report" / "metrics.json").read_text())["decisions"]
    assert decisions["calibration"]["spam"]["languages"].keys() <= set(predicted.languages)
    kept = 0
    for column, policy in enumerate(predicted.policies):
        probabilities, actions = table[f"calibrated.{policy}"].to_pylist(), table[f"action.{policy}"].to_pylist()
        assert np.abs(np.array(probabilities) - predicted.scores[:, column]).max() > 0.01
        for score, language, action in zip(predicted.scores[:, column], predicted.languages, actions, strict=True):
            above = decisions["thresholds"][policy][language]["look_at"]["above"]
            kept += above is not None
            assert action == (None if above is None else "look_at" if score > above else "allow")
    assert kept
    assert {"fitted_on": "validation"} | load_bundle(bundle_of(config)).decisions.to_json() == decisions


def test_labels_may_be_absent(config: Config) -> None:
    posts = read_posts(config)[:30]
    labeled, _ = predict_lines(config, posts, "labeled")
    for number, post in enumerate(posts):
        post["labels"] = None
        if number % 2:
            del post["labels"]
    unlabeled, _ = predict_lines(config, posts, "unlabeled")
    assert np.isnan(unlabeled.labels).all()
    np.testing.assert_allclose(unlabeled.scores, labeled.scores, atol=1e-6)


def test_what_may_not_be_read_is_not_scored_and_what_is_broken_is_named(config: Config) -> None:
    posts = read_posts(config)[:20]
    posts[0]["consent"] = False
    posts[1]["expires_at"] = "2020-01-01"
    posts[2]["image"] = "img/missing.png"
    (Path(str(config.data.path)).parent / "img" / "torn.png").write_bytes(b"\x89PNG torn")
    posts[3]["image"] = "img/torn.png"
    scored, said = predict_lines(config, posts, "broken")
    assert scored.ids == sorted(post["id"] for post in posts[4:])
    quarantine = Path(str(config.data.path)).with_name("broken.parquet.quarantine.jsonl")
    named = [json.loads(line)["id"] for line in quarantine.read_text(encoding="utf-8").splitlines()]
    assert sorted(named) == sorted([posts[2]["id"], posts[3]["id"]])
    assert "1 left out (no_consent); 1 left out (expired)" in said
    assert f"2 refused -> {quarantine}" in said


def test_what_killed_predictions_left_is_removed_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / ".predict-killed" / "shards").mkdir(parents=True)
    with _workspace(tmp_path) as first, _workspace(tmp_path) as second:
        assert sorted(tmp_path.iterdir()) == sorted([first, second])
    assert not list(tmp_path.iterdir())


def test_nobody_looks_for_killed_predictions_while_one_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = tempfile.TemporaryDirectory

    def made(**options: Any) -> Any:
        with pytest.raises(BlockingIOError), _locked(tmp_path):
            pass
        return make(**options)

    monkeypatch.setattr(tempfile, "TemporaryDirectory", made)
    with _workspace(tmp_path) as folder, _locked(tmp_path), pytest.raises(BlockingIOError), _locked(folder):
        pass


def test_wrong_posts_are_all_listed_and_nothing_is_written(config: Config) -> None:
    posts = read_posts(config)[:5]
    posts[1]["labels"] = {"spma": 1}
    posts[3]["restricted"] = True
    with pytest.raises(UserError) as error:
        predict_lines(config, posts, "wrong")
    assert "wrong.jsonl:2: labels.spma" in str(error.value)
    assert "wrong.jsonl:4: restricted" in str(error.value)
    assert not Path(str(config.data.path)).with_name("wrong.parquet").exists()


def test_a_damaged_bundle_is_refused(config: Config, tmp_path: Path) -> None:
    bundle = write_bundle(replace(config, description="Another one."), Path(config.run_dir))
    assert "Another one." in (bundle / "card.md").read_text()
    copied = tmp_path / "copied"
    subprocess.run(["cp", "-r", bundle, copied], check=True)
    load_bundle(copied)
    data = bytearray((copied / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copied / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="not what the manifest says"):
        load_bundle(copied)
    (copied / "model.safetensors").unlink()
    with pytest.raises(UserError, match="missing; export the bundle again"):
        load_bundle(copied)
    with pytest.raises(UserError, match="crossguard export"):
        load_bundle(tmp_path)


def test_the_card_says_what_was_measured_and_on_which_step(config: Config) -> None:
    card = (bundle_of(config) / "card.md").read_text(encoding="utf-8")
    metrics = Path(config.run_dir) / "report" / "metrics.json"
    measured = json.loads(metrics.read_text())
    spam = measured["splits"]["test"]["policies"]["spam"]["all"]
    assert (
        f"| spam | {spam['average_precision']:.3f} | {spam['auroc']:.3f} | {spam['n']} | {spam['positives']} |" in card
    )
    older = measured | {"checkpoint": {"step": 2}}
    metrics.write_text(json.dumps(older))
    try:
        again = write_bundle(config, Path(config.run_dir))
    finally:
        metrics.write_text(json.dumps(measured))
    assert "figures are of step 2, not of this model" in (again / "card.md").read_text()
    # Thresholds of another step are not those of this one.
    assert load_bundle(again).decisions == Decisions({}, {}, {})


def test_a_pretrained_encoder_is_rebuilt_without_its_hub(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    posts = write_posts(tmp_path / "posts")
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words.train([str(posts)], trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    hub = tmp_path / "hub"
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(hub)
    BertModel(BertConfig(vocab_size=words.get_vocab_size(), **TINY)).save_pretrained(hub)

    config = make_config(posts, tmp_path / "run")
    text = TextEncoderConfig(pretrained=str(hub), max_length=32, prefix="query: ")
    config = replace(config, model=replace(config.model, text=text))
    make_run(config)
    run_evaluation(config, ALONE)
    bundle = write_bundle(config, tmp_path / "run")
    hub.rename(tmp_path / "gone")
    assert str(tmp_path) not in (bundle / "config.json").read_text()
    # A bundle is copied to where it serves; it must not look for anything beside it.
    moved = bundle.rename(tmp_path / "served")
    model, encode, taxonomy, _ = load_bundle(moved)
    assert taxonomy.names == ("spam", "insult")
    assert encode.tokenizer.vocab_size == words.get_vocab_size()
    assert not model.training
    predict(moved, config.data, tmp_path / "scores.parquet", batch_size=16)
    predicted = Predictions.read(tmp_path / "scores.parquet")
    evaluated = Predictions.read(tmp_path / "run" / "predictions" / "test.parquet")
    rows = {post: row for row, post in enumerate(predicted.ids)}
    np.testing.assert_allclose(predicted.scores[[rows[post] for post in evaluated.ids]], evaluated.scores, atol=1e-6)


def test_serving_and_evaluating_need_no_deepspeed(config: Config, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from crossguard.configs.schema import DataConfig; "
        "import crossguard.train.evaluation.stage; from crossguard.train.export.predict import predict; "
        "bundle, posts, output = sys.argv[1:]; predict(Path(bundle), DataConfig(path=posts), Path(output), 64); "
        "assert 'deepspeed' not in sys.modules"
    )
    output = tmp_path / "scores.parquet"
    subprocess.run([sys.executable, "-c", code, bundle_of(config), str(config.data.path), output], check=True)
    assert len(Predictions.read(output)) == 240

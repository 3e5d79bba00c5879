"""Fine-tuning: batches that lack a modality on a rank, averaged weights, adapters, activations computed again."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_posts
from embeddings_job import job
from evaluation_job import ALONE, MODEL
from rank_models import alone, run_ranks
from rank_pretrained import OFFLOADS
from safetensors.torch import load_file
from test_encoders import pretrained_config, save_pretrained_clip, save_pretrained_text
from tiny_models import IMAGES, POSTS, TAXONOMY, VIT, batch_of, model_config
from torch._dynamo.utils import counters

from crossguard.configs.errors import UserError
from crossguard.configs.schema import Config
from crossguard.configs.schema.encoders import LoraConfig
from crossguard.configs.schema.model import ModelConfig
from crossguard.data.shards.build import build_shards
from crossguard.train.checkpoint_folder import best_or_latest
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.stage import run_evaluation
from crossguard.train.export.bundle import load_bundle, write_bundle
from crossguard.train.export.predict import predict
from crossguard.train.models import build_model
from crossguard.train.models.activations import checkpoint_activations
from crossguard.train.models.lora import merge_lora
from crossguard.train.optimizer import layer_factors
from crossguard.train.tokenizers import ByteTokenizer
from crossguard.train.training import run_training

HERE = Path(__file__).parent
STAGES = range(4)
# AdamW scales up the rounding of gradients that are below its epsilon; a step moves weights by sixty times as much.
WEIGHTS = 5e-5


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("finetuning")
    run_ranks(2, HERE / "rank_finetuning.py", str(folder))
    answers: list[dict[str, Any]] = json.loads((folder / "found.json").read_text())
    return answers


def test_ranks_and_micro_batches_may_lack_modalities_and_labels(found: list[dict[str, Any]]) -> None:
    """Losses and weights are those of one whole batch."""
    for rank in found:
        assert rank["modalities"].pop("moved") > 1e-3
        assert len(rank["modalities"]) == 8
        for case, difference in rank["modalities"].items():
            assert difference["losses"] < 1e-6, case
            assert difference["weights"] < WEIGHTS, case


def test_ranks_and_micro_batches_may_lack_videos_and_sound(found: list[dict[str, Any]]) -> None:
    """The same with four modalities and text fields."""
    for rank in found:
        assert rank["media"].pop("moved") > 1e-3
        assert len(rank["media"]) == 4
        for case, difference in rank["media"].items():
            assert difference["losses"] < 1e-6, case
            assert difference["weights"] < WEIGHTS, case


def test_ranks_may_lack_modalities_in_every_kind_of_fusion(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert len(rank["fusions"]) == 8
        for case, difference in rank["fusions"].items():
            assert difference["losses"] < 1e-6, case
            assert difference["weights"] < WEIGHTS < 1e-3 < difference["moved"], case


def test_averaged_weights(found: list[dict[str, Any]]) -> None:
    for rank in found:
        averages = rank["averages"]
        for stage in STAGES:
            assert averages[f"{stage} average"] < WEIGHTS
            assert averages[f"{stage} bundle"] < WEIGHTS
            assert averages[f"{stage} logits moved"] > 1e-3
        assert sum(right is True for right in averages.values()) == 7 * len(STAGES)
        assert not any(right is False for right in averages.values()), averages


def test_adapters_on_two_ranks(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for stage in STAGES:
            assert rank["adapters"][f"{stage} losses"] < 1e-6
            assert rank["adapters"][f"{stage} weights"] < 1e-6
            assert rank["adapters"][f"{stage} resumed"]


def test_activations_computed_again(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for stage in STAGES:
            case = rank["checkpointing"][str(stage)]
            assert case["same"]
            assert case["losses"] == 0
            assert case["saved"] < 0.75


def test_pretrained_weights_are_shared_out_as_they_are_read(found: list[dict[str, Any]]) -> None:
    """No rank of stage 3 holds them, and they are those of the ordinary way."""
    for rank in found:
        for name in ("plain", "adapted", "fresh", "offloaded"):
            case = {key.removeprefix(f"{name} "): value for key, value in rank["shared_out"].items()}
            # What ZeRO-3 keeps whole, below the persistence threshold, is partitioned as well until the engine starts.
            assert case["held"] == 0
            assert case["shared out"] * 2 >= case["whole"] > 1000
            assert case["flags"]
            assert case["buffers"]
            assert case["weights"] == 0
            assert case["state"]
            assert case["groups"]


def test_offload_changes_nothing(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for name in OFFLOADS:
            assert rank["offloaded"][f"{name} losses"] < 1e-6
            assert rank["offloaded"][f"{name} state"] < 1e-6
            assert rank["offloaded"][f"{name} resumed"]
            assert rank["offloaded"][f"{name} resumed state"]


def with_lora(model: ModelConfig, **lora: Any) -> ModelConfig:
    adapters = LoraConfig(**{"rank": 2, "alpha": 4.0, "dropout": 0.1, **lora})
    return replace(model, text=replace(model.text, lora=adapters), image=replace(model.image, lora=adapters))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Posts and their shards."""
    folder = tmp_path_factory.mktemp("jobs")
    write_posts(folder / "posts", 120)
    build_shards(job(folder, "build", MODEL, 0, 0), folder / "shards", folder / "quarantine.jsonl")
    return folder


def losses_of(config: Config) -> list[float]:
    lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"]


def metrics_of(config: Config) -> tuple[float, float]:
    """Average precision on validation as training saw it at its last step, and as the report says."""
    lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    seen = [line["macro.average_precision"] for line in lines if line["split"] == "validation"]
    report = json.loads((Path(config.run_dir) / "report" / "metrics.json").read_text())
    return seen[-1], report["splits"]["validation"]["macro"]["average_precision"]


def test_adapters_and_averages_through_the_whole_job(folder: Path) -> None:
    """Validation, report, bundle and prediction all use the averaged weights; the bundle is a plain model."""
    settings = {"ema_decay": 0.9, "gradient_checkpointing": True, "layer_decay": 0.9}
    config = job(folder, "adapted", with_lora(MODEL), 2, every=6, **settings)
    run_dir = Path(config.run_dir)
    run_training(config, alone())
    run_evaluation(config, ALONE)
    write_bundle(config, run_dir)
    validated, reported = metrics_of(config)
    assert validated == pytest.approx(reported, abs=1e-12)
    plain = build_model(MODEL, TAXONOMY, ByteTokenizer(), 0)
    bundle = load_bundle(run_dir / "bundle")
    assert {name: p.shape for name, p in bundle.model.named_parameters()} == {
        name: p.shape for name, p in plain.named_parameters()
    }
    predict(run_dir / "bundle", config.data, run_dir / "all.parquet", batch_size=5)
    predicted = Predictions.read(run_dir / "all.parquet")
    rows = {post: row for row, post in enumerate(predicted.ids)}
    evaluated = Predictions.read(run_dir / "predictions" / "test.parquet")
    same = [rows[post] for post in evaluated.ids]
    np.testing.assert_allclose(predicted.scores[same], evaluated.scores, atol=1e-5)
    assert evaluated.scores.std() > 1e-3
    # The last weights, which nobody validated, are others.
    kept = load_file(best_or_latest(run_dir) / "fragments-00000.safetensors")
    assert (kept["average:0:heads.main.logits.weight"] - kept["weight:0:heads.main.logits.weight"]).abs().max() > 1e-4
    assert torch.equal(
        load_file(run_dir / "bundle" / "model.safetensors")["heads.main.logits.weight"].flatten(),
        kept["average:0:heads.main.logits.weight"],
    )
    with pytest.raises(UserError, match=r"train\.ema_decay: was 0\.9, is now 0\.5"):
        run_training(replace(config, train=replace(config.train, ema_decay=0.5, max_steps=7)), alone())


def test_a_pretrained_encoder_through_stages_3_and_0(folder: Path) -> None:
    """Stage 3 reads it in parts, stage 0 goes on; the losses are those of stage 0 throughout."""
    save_pretrained_text(folder / "encoder")
    save_pretrained_clip(folder / "clip")
    pretrained = pretrained_config(folder)
    text = replace(pretrained.text, pretrained=str(folder / "encoder"))
    model, settings = replace(pretrained, text=text), {"schedule_steps": 6}
    whole = job(folder, "whole", model, 0, 0, **settings)
    run_training(whole, alone())
    run_training(job(folder, "parts", model, 3, 0, max_steps=3, **settings), alone())
    parts = job(folder, "parts", model, 0, 0, **settings)
    run_training(parts, alone())
    assert len(losses_of(whole)) == 6
    assert losses_of(parts) == pytest.approx(losses_of(whole), abs=1e-6)


def test_compiled_towers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced whole and for every length; by hand with torch's own code generator, which takes a minute."""
    plain = job(folder, "plain", MODEL, 1, 0)
    run_training(plain, alone())
    traced = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    counters.clear()
    compiled = job(folder, "compiled", MODEL, 1, 0, compile=True)
    run_training(compiled, alone())
    # Each tower, forward alone and with a backward pass, at most.
    assert 2 <= counters["stats"]["unique_graphs"] <= 4
    assert not counters["graph_break"]
    assert losses_of(compiled) == pytest.approx(losses_of(plain), abs=1e-4)


def test_adapters_alone_are_trained_in_a_tower() -> None:
    model = build_model(with_lora(model_config()), TAXONOMY, ByteTokenizer(), 1).eval()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = {name for name in trained if name.startswith(("text.", "image."))}
    assert adapters
    assert all(".lora_A." in name or ".lora_B." in name for name in adapters)
    assert {"fusion.first", "heads.main.logits.weight"} <= trained
    # What the logits do not use gets nothing to train; of the text encoder that is the pooler.
    assert not any("pooler" in name for name in trained)
    factors = layer_factors([name for name, _ in model.named_parameters()], 0.5)
    assert factors["text.encoder.encoder.layer.0.attention.self.query.lora_A.default.weight"] == 0.5
    assert factors["text.encoder.encoder.layer.1.attention.self.query.lora_A.default.weight"] == 1


@pytest.mark.parametrize("image", ["vit", "siglip", "convnext"])
def test_merged_adapters_say_the_same(image: str) -> None:
    config = with_lora(model_config(image={"vit": VIT, **IMAGES}[image]), alpha=8.0)
    model = build_model(config, TAXONOMY, ByteTokenizer(), 1).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        before = model(batch_of(*POSTS))
        merge_lora(model)
        assert (model(batch_of(*POSTS)) - before).abs().max() < 1e-5
    assert before.std() > 1e-2
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_target_that_matches_nothing() -> None:
    config = with_lora(model_config(), targets=["qurey"])
    with pytest.raises(
        UserError, match=r"model\.text\.lora\.targets: 'qurey' matches no linear .*; did you mean 'query'"
    ):
        build_model(config, TAXONOMY, ByteTokenizer(), 1)


def test_an_encoder_that_cannot_compute_again_is_named() -> None:
    model = build_model(model_config(image=IMAGES["convnext"]), TAXONOMY, ByteTokenizer(), 1)
    with pytest.raises(UserError, match=r"train\.gradient_checkpointing: the image encoder \(ConvNextModel\)"):
        checkpoint_activations(model)

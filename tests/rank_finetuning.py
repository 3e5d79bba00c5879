"""Run on 2 ranks by test_finetuning.py: the real classifier in every ZeRO stage, against a bare loop on whole batches."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from finetuning_job import (
    STAGES,
    apart,
    config_of,
    count_saved,
    loop_of,
    posts_of,
    reference,
    save,
    trained,
)
from media_posts import XLS_R, media_config
from rank_checkpoint import held, same
from rank_engine import largest_difference
from rank_pretrained import offloaded, shared_out
from tiny_models import BERT, VIT, batch_of, model_config

from crossguard.configs.errors import Preempted
from crossguard.configs.parent_death import die_with_parent
from crossguard.configs.schema import ModelConfig
from crossguard.configs.schema.encoders import LoraConfig
from crossguard.configs.schema.fusion import FusionConfig
from crossguard.configs.schema.heads import HeadConfig
from crossguard.configs.schema.taxonomy import PolicyConfig
from crossguard.train.checkpoint import load_checkpoint
from crossguard.train.ema import AVERAGE
from crossguard.train.fragments import averaged_weights
from crossguard.train.ranks import Ranks, end_process, init_ranks
from crossguard.train.stored_weights import load_weights

# The stages of each, and what holds the bias of its keys; the default kind goes through all stages elsewhere.
FUSIONS: dict[str, tuple[FusionConfig, tuple[int, ...], list[str]]] = {
    "late": (FusionConfig("late"), (0, 3), []),
    "gated": (FusionConfig("gated"), (1, 3), []),
    "cross": (FusionConfig("cross"), (2, 3), ["fusion.*key_value.bias"]),
    "bottleneck": (FusionConfig(layers=2, bottleneck=2), (2, 3), ["fusion.*qkv.bias"]),
}


def modalities(ranks: Ranks, _: Path) -> dict[str, Any]:
    """Ranks, and micro-batches, that lack modalities or labels."""
    return lacking(ranks, model_config(), (4, 6))


def media(ranks: Ranks, _: Path) -> dict[str, Any]:
    """The same with videos, sound and text fields; one encoder looks at images and frames."""
    return lacking(ranks, media_config(XLS_R), (4,))


def lacking(ranks: Ranks, model: ModelConfig, sizes: tuple[int, ...]) -> dict[str, Any]:
    """How far the losses and weights of every stage are from those of a bare loop."""
    found: dict[str, Any] = {}
    weights, losses = reference(config_of(0, model))
    for stage in STAGES:
        for micro_batch_size in sizes:
            with trained(config_of(stage, model, micro_batch_size=micro_batch_size), ranks) as (loop, engine_losses):
                found[f"stage {stage} micro-batches up to {micro_batch_size}"] = {
                    "losses": apart(losses, engine_losses),
                    "weights": largest_difference(loop.engine, weights[-1]),
                }
                # What this rank updates has moved, so that it could have gone wrong.
                found["moved"] = min(found.get("moved", 1.0), largest_difference(loop.engine, weights[0]))
    return found


def fusions(ranks: Ranks, _: Path) -> dict[str, Any]:
    """The same in every kind of fusion, under two heads of which one's policy is a part of the other's."""
    policies = [PolicyConfig("spam"), PolicyConfig("insult", parent="spam")]
    found = {}
    for name, (fusion, stages, biases) in FUSIONS.items():
        heads = {"main": HeadConfig(["spam"]), "insults": HeadConfig(["insult"], 0 if name == "late" else 3)}
        model = replace(model_config(), fusion=replace(fusion, width=16, heads=2), heads=heads)
        configs = [config_of(stage, model, freeze=["*key.bias", "*k_proj.bias", *biases]) for stage in stages]
        for config in configs:
            config.taxonomy = replace(config.taxonomy, policies=policies)
        weights, losses = reference(configs[0])
        for stage, config in zip(stages, configs, strict=True):
            with trained(config, ranks) as (loop, engine_losses):
                found[f"{name} {stage}"] = {
                    "losses": apart(losses, engine_losses),
                    "weights": largest_difference(loop.engine, weights[-1]),
                    "moved": largest_difference(loop.engine, weights[0]),
                }
    return found


def averages(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """The moving average: its value, validation under it, and its way through checkpoints."""
    config = config_of(0, ema_decay=0.3)
    weights, _ = reference(config)
    expected = weights[0]
    for updates, after in enumerate(weights[1:], start=1):
        decay = min(0.3, (1 + updates) / (10 + updates))
        expected = {name: decay * expected[name] + (1 - decay) * after[name] for name in after}
    found: dict[str, Any] = {}
    for stage in STAGES:
        config = config_of(stage, ema_decay=0.3)
        with trained(config, ranks) as (loop, _):
            engine = loop.engine
            before, logits = held(engine), engine(batch_of(*posts_of(2)))
            with averaged_weights(engine):
                found[f"{stage} average"] = largest_difference(engine, expected)
                found[f"{stage} logits moved"] = float((engine(batch_of(*posts_of(2))) - logits).detach().abs().max())
            found[f"{stage} restored"] = same(before, held(engine))
            found[f"{stage} logits restored"] = torch.equal(engine(batch_of(*posts_of(2))), logits)
            for error in (Preempted("asked"), ValueError("broken")):
                with suppress(type(error)), averaged_weights(engine):
                    raise error
                found[f"{stage} restored after {type(error).__name__}"] = same(before, held(engine))
            found[f"{stage} has averages"] = any(kind == AVERAGE for kind, _, _ in before)
            save(engine, folder / f"ema-{stage}")
            # A gradient that is not finite: the step is skipped.
            engine.backward(engine(batch_of(*posts_of(2))).sum() * float("nan"))
            engine.step(1.0)
            found[f"{stage} skipped"] = same(before, held(engine))
        found[f"{stage} bundle"] = max(
            float((tensor - expected[name]).abs().max())
            for name, tensor in load_weights(folder / f"ema-{stage}" / "checkpoints" / "step-00000003").items()
            if name in expected
        )
        # Another stage loads and saves it, then this stage goes on as if nothing had happened.
        other = loop_of(config_of((stage + 2) % 4, ema_decay=0.3), ranks)
        load_checkpoint(folder / f"ema-{stage}" / "checkpoints" / "step-00000003", other.engine, seed=0)
        checkpoint = save(other.engine, folder / f"ema-{stage}-other")
        other.engine.close()
        resumed = loop_of(config, ranks)
        load_checkpoint(checkpoint, resumed.engine, seed=0)
        found[f"{stage} resumed"] = same(before, held(resumed.engine))
        resumed.engine.close()
    return found


def adapters(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """LoRA in both towers: what is trained, equal to a bare loop, and through checkpoints into another stage."""
    lora = LoraConfig(rank=2, alpha=4.0)
    text = replace(model_config().text, lora=lora)
    image = replace(model_config().image, lora=replace(lora, targets=["q_proj", "fc1"]))
    model = replace(model_config(), text=text, image=image)
    settings = {"layer_decay": 0.5, "freeze": ["*qkv.bias"]}
    weights, losses = reference(config_of(0, model, **settings))
    found: dict[str, Any] = {}
    for stage in STAGES:
        config = config_of(stage, model, **settings)
        with trained(config, ranks) as (loop, engine_losses):
            found[f"{stage} losses"] = apart(losses, engine_losses)
            found[f"{stage} weights"] = largest_difference(loop.engine, weights[-1])
            before, checkpoint = held(loop.engine), save(loop.engine, folder / f"lora-{stage}")
        other = loop_of(config_of((stage + 1) % 4, model, **settings), ranks)
        load_checkpoint(checkpoint, other.engine, seed=0)
        checkpoint = save(other.engine, folder / f"lora-{stage}-other")
        other.engine.close()
        resumed = loop_of(config, ranks)
        load_checkpoint(checkpoint, resumed.engine, seed=0)
        found[f"{stage} resumed"] = same(before, held(resumed.engine))
        resumed.engine.close()
    return found


def checkpointing(ranks: Ranks, _: Path) -> dict[str, Any]:
    """The same weights, bit for bit, with activations computed again; dropout is on."""
    text = {**BERT, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.1}
    model = model_config(text, {**VIT, "hidden_dropout_prob": 0.2})
    found = {}
    for stage in STAGES:
        saved, states, losses = [], [], []
        for on in (False, True):
            config = config_of(stage, model, gradient_checkpointing=on)
            with count_saved() as counted, trained(config, ranks) as (loop, engine_losses):
                states.append(held(loop.engine))
                losses.append(engine_losses)
            saved.append(counted[0])
        found[str(stage)] = {"same": same(*states), "losses": apart(*losses), "saved": saved[1] / saved[0]}
    return found


CASES = (modalities, media, fusions, averages, adapters, checkpointing, shared_out, offloaded)


def main(folder: str, *names: str) -> None:
    """Write what every rank found."""
    die_with_parent()
    ranks = init_ranks()
    found = {case.__name__: case(ranks, Path(folder)) for case in CASES if not names or case.__name__ in names}
    everyone = ranks.gather(found)
    if ranks.is_first:
        (Path(folder) / "found.json").write_text(json.dumps(everyone, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_process(0)

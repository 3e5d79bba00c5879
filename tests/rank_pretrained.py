"""Cases of rank_finetuning.py: pretrained encoders under ZeRO-3, whose weights no rank ever holds whole, and offload."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from finetuning_job import apart, config_of, loop_of, save, train, trained
from rank_checkpoint import held, same
from rank_engine import largest_difference
from test_encoders import pretrained_config, save_pretrained_clip, save_pretrained_text
from tiny_models import TAXONOMY

from crossguard.configs.schema.encoders import LoraConfig
from crossguard.train.checkpoint import load_checkpoint
from crossguard.train.encode import PostEncoder
from crossguard.train.engine import Engine
from crossguard.train.models import build_model
from crossguard.train.ranks import Ranks
from crossguard.train.starting_model import starting_model

CPU = {"device": "cpu"}
OFFLOADS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 optimizer": (1, {"offload_optimizer": CPU}),
    "2 optimizer": (2, {"offload_optimizer": CPU}),
    "3 optimizer": (3, {"offload_optimizer": CPU}),
    "3 both": (3, {"offload_optimizer": CPU, "offload_param": CPU}),
}


def shared_out(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Weights that are read in parts are those of the ordinary way, the steps from them too, and no rank has them all."""
    if ranks.is_first:
        save_pretrained_text(folder / "text")
        save_pretrained_clip(folder / "clip")
    ranks.gather(None)
    plain = pretrained_config(folder)
    adapted = replace(plain, text=replace(plain.text, lora=LoraConfig(rank=2)))
    fresh_beside = replace(
        plain, image=replace(plain.image, pretrained=None, config={"model_type": "vit", **VIT_SIZES})
    )
    found = {}
    both = {"offload_optimizer": CPU, "offload_param": CPU}
    cases = {"plain": plain, "adapted": adapted, "fresh": fresh_beside, "offloaded": plain}
    for name, model_config in cases.items():
        deepspeed = both if name == "offloaded" else None
        config = config_of(3, model_config, deepspeed=deepspeed, freeze=["image.*"], layer_decay=0.5)
        encode = PostEncoder(config.model, TAXONOMY)
        whole = build_model(config.model, TAXONOMY, encode.tokenizer, config.seed)
        model = starting_model(config, ranks, encode, 4)
        read = [p for n, p in model.named_parameters() if n.startswith("text.") and "lora" not in n]
        found[f"{name} held"] = sum(p.numel() for p in read)
        found[f"{name} shared out"] = sum(p.ds_tensor.numel() for p in read if hasattr(p, "ds_tensor"))
        found[f"{name} whole"] = sum(p.ds_numel for p in read if hasattr(p, "ds_numel"))
        found[f"{name} flags"] = trainable(whole) == trainable(model)
        found[f"{name} buffers"] = same(buffers(whole), buffers(model))
        engine = Engine(model, config, ranks, 4)
        weights = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
        found[f"{name} weights"] = largest_difference(engine, weights)
        ordinary = Engine(whole, config, ranks, 4)
        found[f"{name} state"] = same(held(engine), held(ordinary))
        found[f"{name} groups"] = groups(engine) == groups(ordinary)
        engine.close()
        ordinary.close()
    return found


VIT_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "patch_size": 8,
}


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def buffers(model: torch.nn.Module) -> Any:
    return dict(model.named_buffers())


def groups(engine: Engine) -> list[tuple[float, float]]:
    """Weight decay and share of the learning rate of each parameter group."""
    return [(group["weight_decay"], group["lr_scale"]) for group in engine.optimizer.param_groups]


def offloaded(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """States in the host's memory: the steps are the same, and a resume is bit-equal."""
    found = {}
    for name, (stage, deepspeed) in OFFLOADS.items():
        with trained(config_of(stage, ema_decay=0.5), ranks) as (loop, losses):
            without = held(loop.engine)
        config = config_of(stage, deepspeed=deepspeed, ema_decay=0.5)
        loop = loop_of(config, ranks)
        offloaded_losses = train(loop, range(1, 3))
        checkpoint = save(loop.engine, folder / f"offloaded {name}")
        offloaded_losses += train(loop, range(3, 4))
        state = held(loop.engine)
        loop.engine.close()
        found[f"{name} losses"] = apart(losses, offloaded_losses)
        found[f"{name} state"] = max(float((state[key] - without[key]).abs().max()) for key in without)
        resumed = loop_of(config, ranks)
        load_checkpoint(checkpoint, resumed.engine, seed=0)
        found[f"{name} resumed"] = train(resumed, range(3, 4)) == offloaded_losses[2:]
        found[f"{name} resumed state"] = same(held(resumed.engine), state)
        resumed.engine.close()
    return found

"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the linear modules of a tower, by way of `peft`."""

from __future__ import annotations

import re

from torch import nn

from crossguard.configs.lora_targets import is_end_of, no_target
from crossguard.configs.schema.encoders import ALL_LINEAR, LoraConfig


def add_lora(tower: nn.Module, config: LoraConfig, key: str) -> None:
    """Freeze a tower and train adapters beside it; at first they add nothing to what it says. Nothing at rank 0.

    Args:
        tower: changed in place.
        config: which modules get one, and how large.
        key: where `config` stands, for errors.

    Raises:
        UserError: a target matches no linear module.
    """
    if not config.rank:
        return
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model

    chosen = _chosen(_linear_names(tower), config.targets, key)
    settings = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # its annotation says int, its product takes any number
        lora_dropout=config.dropout,
        target_modules="|".join(map(re.escape, chosen)),
    )
    inject_adapter_in_model(settings, tower)


def merge_lora(model: nn.Module) -> None:
    """Add every adapter to the weights beside it, and take it away: the model says the same without `peft`."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())


def _linear_names(tower: nn.Module) -> list[str]:
    """Those that are called; torch's own attention takes the weights of its modules instead."""
    from transformers.pytorch_utils import Conv1D

    inside_attention = {
        id(part) for module in tower.modules() if isinstance(module, nn.MultiheadAttention) for part in module.modules()
    }
    return [
        name
        for name, module in tower.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in inside_attention
    ]


def _chosen(names: list[str], targets: list[str], key: str) -> list[str]:
    chosen: set[str] = set()
    for target in targets:
        matched = [name for name in names if target == ALL_LINEAR or is_end_of(target, name)]
        if not matched:
            raise no_target(key, target, names)
        chosen.update(matched)
    return sorted(chosen)

"""AdamW's parameter groups (no decay, layer-wise decay, frozen by pattern) and the learning rate of a step."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

from crossguard.configs.errors import UserError
from crossguard.configs.freeze_patterns import freezes, no_match
from crossguard.configs.schema import TrainConfig
from crossguard.train import ema

# The n-th layer of an encoder, in the names that transformers, timm and our own models use.
_LAYER = re.compile(r"^(text|image|video|audio)\b.*?\b(?:layers?|blocks?|h|stages?)\.(\d+)\.")
_BELOW_ALL_LAYERS = re.compile(
    r"^(text|image|video)\b.*(?:embed|patch|stem|position)|^(audio)\b.*(?:embed|conv|feature_)"
)


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Switch off training of every parameter whose name, or that of a module which holds it, matches one of `patterns`
    (fnmatch).

    Raises:
        UserError: a pattern matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        matched = {name for name in names if freezes(pattern, name)}
        if not matched:
            raise no_match(pattern, names)
        for name, parameter in model.named_parameters():
            if name in matched:
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("train.freeze: every parameter is frozen; leave at least one to train")


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over the trainable parameters; each group carries `lr_scale`, its share of the rate.

    Raises:
        UserError: a pattern of `train.lr_factors` matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    factors = layer_factors(names, train.layer_decay)
    for pattern, factor in train.lr_factors.items():
        matched = [name for name in names if freezes(pattern, name)]
        if not matched:
            raise no_match(pattern, names, "train.lr_factors")
        factors |= dict.fromkeys(matched, factor)
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if _is_vector(parameter) else train.weight_decay
            groups[decay, factors[name]].append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": members, "weight_decay": decay, "lr_scale": factor}
            for (decay, factor), members in sorted(groups.items(), key=lambda item: item[0], reverse=True)
        ],
        lr=train.lr,
        betas=(train.betas[0], train.betas[1]),
        fused=True,
    )
    if train.ema_decay:
        ema.follow(optimizer, train.ema_decay)
    return optimizer


def layer_factors(names: list[str], layer_decay: float) -> dict[str, float]:
    """The factor of the learning rate of each parameter (layer-wise decay, arXiv 1801.06146).

    The top layer of an encoder and all that lies above it learn at the full rate, each layer below at `layer_decay`
    of the one above it, and the embeddings below the lowest layer.
    """
    layers = {name: (match[1], int(match[2])) for name in names if (match := _LAYER.match(name))}
    depth: dict[str, int] = defaultdict(int)
    for encoder, layer in layers.values():
        depth[encoder] = max(depth[encoder], layer + 1)
    factors = {}
    for name in names:
        below_top = 0
        if name in layers:
            encoder, layer = layers[name]
            below_top = depth[encoder] - 1 - layer
        elif match := _BELOW_ALL_LAYERS.match(name):
            below_top = depth[match[1] or match[2]]
        factors[name] = layer_decay**below_top
    return factors


def learning_rate(step: int, train: TrainConfig, schedule_steps: int) -> float:
    """The rate of step n ≥ 1: linear warm-up, a cosine to `min_lr_ratio` at `schedule_steps`, constant after it."""
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    span = max(schedule_steps - train.warmup_steps, 1)
    done = min((step - train.warmup_steps) / span, 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return train.lr * (train.min_lr_ratio + (1 - train.min_lr_ratio) * cosine)


def _is_vector(parameter: nn.Parameter) -> bool:
    """Biases, norms, scales and learned tokens: at most one axis longer than 1."""
    # Of what ZeRO-3 has partitioned already, a rank sees no axis.
    return sum(length > 1 for length in getattr(parameter, "ds_shape", parameter.shape)) <= 1

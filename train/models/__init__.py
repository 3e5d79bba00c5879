"""Models: a tower for each modality, their fusion, heads with a logit for each policy."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from crossguard.configs.schema.model import ModelConfig
from crossguard.data.loading.collate import Batch
from crossguard.data.taxonomy import Taxonomy
from crossguard.train.models.classifier import Classifier
from crossguard.train.models.example import PostSize, example_batch
from crossguard.train.models.hugging_face import encoder_config
from crossguard.train.tokenizers import Tokenizer


def build_model(
    config: ModelConfig, taxonomy: Taxonomy, tokenizer: Tokenizer, seed: int, *, unused: Collection[str] | None = None
) -> Classifier:
    """A classifier whose fresh weights depend on the configuration and the seed alone, not on the rank.

    Parameters that take no part in the logits (poolers, mask tokens of pretraining) are frozen: one that waits for a
    gradient which never comes is an error under some ZeRO stages.

    Args:
        config: the model's configuration.
        taxonomy: the policies, one logit for each, and their levels of severity.
        tokenizer: of the texts.
        seed: of the fresh weights.
        unused: the names of the parameters that take no part, for a model that cannot be run yet (its weights are
            shared out over the ranks); by default a pass over an example finds them.

    Raises:
        UserError: an encoder does not exist or does not fit tokenizer, length or size.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(config, taxonomy, tokenizer.vocab_size, tokenizer.pad_id, seed)
    if unused is None:
        freeze_unused(model, example_batch(config, taxonomy.num_labels, 1, PostSize(), tokenizer.pad_id))
        return model
    for name, parameter in model.named_parameters():
        if name in unused:
            parameter.requires_grad_(False)
    return model.train()


def without_pretrained(config: ModelConfig, model: Classifier) -> ModelConfig:
    """The same architecture, described so that it can be built from its weights alone, without a hub."""
    changed: dict[str, Any] = {}
    for name, encoder in config.encoders.items():
        if encoder.pretrained:
            # Frames may be looked at by an encoder that `image` describes.
            described = "image" if encoder is config.image else name
            tower = getattr(model, name)
            changed[described] = replace(encoder, pretrained=None, config=encoder_config(tower.encoder))
    return replace(config, **changed)


def freeze_unused(model: nn.Module, example: Batch) -> None:
    """Switch off training of the parameters that take no part in the logits of `example`."""
    model.eval()
    model(example).sum().backward()
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)
        parameter.grad = None
    model.train()


__all__ = ["Classifier", "build_model", "freeze_unused", "without_pretrained"]

"""Models: towers for text and image, their fusion, heads with a logit for each policy."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import nn

from crossguard.configs.schema.model import ModelConfig
from crossguard.data.loading.collate import Batch
from crossguard.data.taxonomy import Taxonomy
from crossguard.train.models.classifier import Classifier
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
        freeze_unused(model, _example(config, taxonomy.num_labels, tokenizer.pad_id))
        return model
    for name, parameter in model.named_parameters():
        if name in unused:
            parameter.requires_grad_(False)
    return model.train()


def without_pretrained(config: ModelConfig, model: Classifier) -> ModelConfig:
    """The same architecture, described so that it can be built from its weights alone, without a hub."""
    changed = {}
    for name in config.modalities:
        encoder = getattr(config, name)
        if encoder.pretrained:
            tower = getattr(model, name)
            changed[name] = replace(encoder, pretrained=None, config=encoder_config(tower.encoder))
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


def _example(config: ModelConfig, num_labels: int, pad_id: int) -> Batch:
    """One post with a text of one token and an image."""
    size = config.image.size
    yes = torch.ones(1, dtype=torch.bool)
    return Batch(
        ids=["example"],
        languages=["und"],
        positions=torch.zeros(1, dtype=torch.int64),
        input_ids=torch.full((1, 1), pad_id),
        text_mask=yes[:, None],
        has_text=yes,
        pixels=torch.zeros(1, 3, size, size, dtype=torch.uint8),
        image_post=torch.zeros(1, dtype=torch.int64),
        has_image=yes,
        labels=torch.zeros(1, num_labels),
    )


__all__ = ["Classifier", "build_model", "freeze_unused", "without_pretrained"]

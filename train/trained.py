"""A trained model again: the architecture from its configuration, the weights from a checkpoint or a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from crossguard.configs.errors import UserError
from crossguard.configs.schema.model import ModelConfig
from crossguard.train.encode import PostEncoder
from crossguard.train.models import Classifier, build_model


def load_trained(
    config: ModelConfig, encode: PostEncoder, weights: Mapping[str, torch.Tensor], place: Path
) -> Classifier:
    """The classifier with these weights, in fp32 on the CPU, ready to score.

    Args:
        config: what it was trained with.
        encode: the encoding of its posts; gives taxonomy and tokenizer.
        weights: every parameter and buffer, whole.
        place: where the weights come from, for the error.

    Raises:
        UserError: the weights are of another model.
    """
    model = build_model(config, encode.taxonomy, encode.tokenizer, seed=0)
    wanted, given = _shapes(model.state_dict()), _shapes(weights)
    if wanted != given:
        name = min(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
        raise UserError(
            f"{place}: weights of another model: '{name}' is {given.get(name, 'absent')} there and "
            f"{wanted.get(name, 'absent')} in this configuration; use the model that it was trained with"
        )
    model.load_state_dict(weights)
    return model.eval()


def _shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in weights.items()}

"""Gradient checkpointing (arXiv 1604.06174): layers whose activations are computed again in the backward pass."""

from __future__ import annotations

import warnings

from crossguard.configs.errors import UserError
from crossguard.train.models.classifier import Classifier


def checkpoint_activations(model: Classifier) -> None:
    """Keep only the input of each layer of the towers' encoders. Dropout draws the same numbers again, so that neither
    losses nor gradients change.

    A tower of the user's own takes part by a method `gradient_checkpointing_enable` like that of `transformers`.

    Raises:
        UserError: an encoder does not support it.
    """
    for modality in model.towers:
        tower = getattr(model, modality)
        encoder = getattr(tower, "encoder", tower)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # Of another name, which older 5.x do not know.
                encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if hasattr(encoder, "config"):
                encoder.config.use_cache = False  # A cache of decoders, which warns that it cannot be kept up.
        except (ValueError, AttributeError):
            raise UserError(
                f"train.gradient_checkpointing: the {modality} encoder ({type(encoder).__name__}) does not support it;"
                " switch it off, or choose another encoder"
            ) from None

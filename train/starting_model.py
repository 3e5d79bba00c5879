"""The model that training starts with, on every rank or shared out over them."""

from __future__ import annotations

import functools

from crossguard.configs.errors import UserError
from crossguard.configs.schema import Config
from crossguard.train.deepspeed_settings import deepspeed_config
from crossguard.train.encode import PostEncoder
from crossguard.train.models import Classifier, build_model
from crossguard.train.models.activations import checkpoint_activations
from crossguard.train.models.hugging_face import partitioned
from crossguard.train.planning.shapes import Shapes
from crossguard.train.ranks import Ranks


def starting_model(config: Config, ranks: Ranks, encode: PostEncoder, micro_batch_size: int) -> Classifier:
    """The model with its first weights, not yet under DeepSpeed; all ranks call it.

    Raises:
        UserError: an encoder does not exist or does not fit, or does not support what `train` asks for.
    """
    model = _build(config, ranks, encode, micro_batch_size)
    if config.train.gradient_checkpointing:
        checkpoint_activations(model)
    if config.train.compile:
        for modality in model.towers:
            getattr(model, modality).compile(dynamic=True)
    return model


def _build(config: Config, ranks: Ranks, encode: PostEncoder, micro_batch_size: int) -> Classifier:
    """Under ZeRO-3 pretrained encoders may be larger than a host's memory and are shared out as they are read. Which
    parameters they leave unused is then found on shapes; an encoder that cannot be run on them is read whole."""
    build = functools.partial(build_model, config.model, encode.taxonomy, encode.tokenizer, config.seed)
    if config.zero.stage < 3 or not config.model.has_pretrained:
        return build()
    try:
        unused = Shapes(config).unused
    except UserError as error:  # Whatever else is wrong, building it says so.
        ranks.say(f"train: every rank reads the pretrained encoders whole; {error}")
        return build()
    with partitioned(deepspeed_config(config, ranks.world_size, micro_batch_size)):
        return build(unused=unused)

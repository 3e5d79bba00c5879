"""Small classifiers from configurations, and posts as numbers for them, shared by the tests of models."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from crossguard.configs.schema.encoders import ImageEncoderConfig, TextEncoderConfig
from crossguard.configs.schema.fusion import FusionConfig
from crossguard.configs.schema.model import ModelConfig
from crossguard.data.loading.collate import Batch, collate
from crossguard.data.loading.encoded import EncodedSample
from crossguard.data.taxonomy import Policy, Taxonomy
from crossguard.train.models import Classifier, build_model
from crossguard.train.tokenizers import load_tokenizer

SIZE = 32
TAXONOMY = Taxonomy("test", "1", tuple(Policy(name, "", "OTHER_VIOLATION_TC") for name in ("spam", "insult")))
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
BERT = {"model_type": "bert", **TINY, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VIT = {"model_type": "vit", **TINY, "patch_size": 8}
TEXTS = {
    "bert": BERT,
    "modernbert": {"model_type": "modernbert", **TINY, "local_attention": 4, "global_attn_every_n_layers": 2},
    "xlm-roberta": {"model_type": "xlm-roberta", **TINY, "max_position_embeddings": 129},
    "t5": {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2},
}
IMAGES = {
    "vit": VIT,
    "convnext": {"model_type": "convnext", "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]},
    "siglip": {"model_type": "siglip_vision_model", **TINY, "patch_size": 8},
    "clip": {"model_type": "clip", "vision_config": {**TINY, "patch_size": 8, "image_size": SIZE}},
    "mobilevit": {"model_type": "mobilevit", "hidden_sizes": [8, 8, 16], "neck_hidden_sizes": [4, 4, 4, 4, 4, 8, 24]},
}


def model_config(text: dict[str, Any] = BERT, image: dict[str, Any] = VIT, **values: Any) -> ModelConfig:
    return ModelConfig(
        text=TextEncoderConfig(config=text),
        image=ImageEncoderConfig(config=image, size=SIZE, max_images=3),
        fusion=FusionConfig(width=16, heads=2),
        **values,
    )


def build(config: ModelConfig, seed: int = 1) -> Classifier:
    """A model whose head is not zero any more, so that its logits say something."""
    model = build_model(config, TAXONOMY, load_tokenizer(config.text), seed)
    torch.manual_seed(0)
    nn.init.normal_(model.heads.main.logits.weight, std=0.1)
    return model.eval()


def post(number: int, tokens: int, images: int) -> EncodedSample:
    draw = np.random.default_rng(number)
    return EncodedSample(
        id=f"post-{number}",
        language="und",
        input_ids=draw.integers(3, 259, tokens).astype(np.int32) if tokens else None,
        images=[draw.integers(0, 256, (3, SIZE, SIZE)).astype(np.uint8) for _ in range(images)],
        labels=np.zeros(2, np.float32),
        position=number,
    )


def batch_of(*posts: EncodedSample, **layout: Any) -> Batch:
    return collate(posts, pad_id=0, image_size=SIZE, num_labels=2, **layout)


# Every shape of post: both, long text alone, images alone, nothing at all, one token and several images.
POSTS = [post(0, 5, 1), post(1, 60, 0), post(2, 0, 2), post(3, 100, 1), post(4, 0, 0), post(5, 1, 3)]
BOTH, ONLY_TEXT, ONLY_IMAGES, _, NEITHER, _ = POSTS

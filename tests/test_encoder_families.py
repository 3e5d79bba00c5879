"""Every family of encoders, from a folder as a user would have it: its weights arrive, whole, and say what they should."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import POSTS, SIZE, TAXONOMY, TINY, batch_of, build, model_config
from torch import nn

from crossguard.configs.compose import compose, group_choices
from crossguard.configs.errors import UserError
from crossguard.configs.schema.encoders import ImageEncoderConfig, TextEncoderConfig
from crossguard.configs.schema.fusion import FusionConfig
from crossguard.configs.schema.model import ModelConfig
from crossguard.data.loading.collate import collate
from crossguard.data.loading.sample import RawSample
from crossguard.train.encode import PostEncoder
from crossguard.train.models import without_pretrained

IDS = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WORDS = {**TINY, **IDS, "max_position_embeddings": 131}
PICTURE = {**TINY, "patch_size": 8, "image_size": SIZE}
DUAL = {"text_config": WORDS, "vision_config": PICTURE}
CONVOLUTIONS = {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]}
DEBERTA = {
    "relative_attention": True,
    "position_buckets": 32,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
# Type of the model -> its settings, and how the parameters of it begin that take no part in the logits.
TEXTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "xlm-roberta": (WORDS, ("pooler.",)),
    "bert": (WORDS, ("pooler.",)),
    "deberta-v2": ({**WORDS, **DEBERTA}, ()),
    "modernbert": ({**WORDS, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2}, ()),
    "distilbert": ({**IDS, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16}, ()),
    "mt5": ({**IDS, **T5}, ()),
    "qwen3": ({**WORDS, "num_key_value_heads": 1, "head_dim": 8}, ()),
    "clip": (DUAL, ()),
    "siglip": (DUAL, ("head.",)),
    "siglip2": ({**DUAL, "vision_config": {**TINY, "patch_size": 8, "num_patches": 16}}, ("head.",)),
    "metaclip_2": (DUAL, ()),
}
IMAGES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "vit": (PICTURE, ("pooler.",)),
    "clip": (DUAL, ("post_layernorm.",)),
    "siglip": (DUAL, ("head.",)),
    "siglip2": (TEXTS["siglip2"][0], ("head.",)),
    # Made for larger images, like the published one, whose positions are interpolated.
    "dinov2": ({**PICTURE, "image_size": 56}, ("embeddings.mask_token",)),
    "dinov2_with_registers": ({**PICTURE, "image_size": 56}, ("embeddings.mask_token",)),
    "dinov3_vit": (PICTURE, ("embeddings.mask_token",)),
    "dinov3_convnext": (CONVOLUTIONS, ()),
    "resnet": ({**CONVOLUTIONS, "embedding_size": 8}, ()),
    "swin": (
        {"image_size": SIZE, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
        (),
    ),
}
FAMILIES = [("text", kind) for kind in TEXTS] + [("image", kind) for kind in IMAGES]


def save(kind: str, settings: dict[str, Any], folder: Path) -> Any:
    """A checkpoint of a tiny model; every number of it is drawn, so that a fresh one is told apart."""
    from transformers import AutoConfig, AutoModel

    model = AutoModel.from_config(AutoConfig.for_model(kind, **settings))
    torch.manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model.eval()


def described(role: str, folder: Path, **image: Any) -> ModelConfig:
    return ModelConfig(
        modalities=[role],
        text=TextEncoderConfig(pretrained=str(folder), tokenizer="bytes", max_length=120),
        image=ImageEncoderConfig(pretrained=str(folder), size=SIZE, max_images=3, **image),
        fusion=FusionConfig(width=16, heads=2),
    )


@pytest.mark.parametrize(("role", "kind"), FAMILIES, ids=[f"{role}-{kind}" for role, kind in FAMILIES])
def test_a_checkpoint_of_every_family_is_read_whole(role: str, kind: str, tmp_path: Path) -> None:
    settings, unused = (TEXTS if role == "text" else IMAGES)[kind]
    saved = save(kind, settings, tmp_path)
    if saved.config.is_encoder_decoder:
        saved = saved.get_encoder()
    source = getattr(saved, "text_model" if role == "text" else "vision_model", saved)
    config = described(role, tmp_path)
    model = build(config)
    encoder = getattr(model, role).encoder
    read, written = encoder.state_dict(), source.state_dict()
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], written[name]) for name in read)
    frozen = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
    assert {name for name, _ in encoder.named_parameters() if name.startswith(unused or "-")} == frozen
    with torch.no_grad():
        together = model(batch_of(*POSTS))
        alone = torch.cat([model(batch_of(post)) for post in POSTS])
    assert (together - alone).abs().max() <= 1e-5
    # What a bundle keeps builds the same again, without the folder.
    kept = without_pretrained(config, model)
    kept = replace(
        kept, **{role: replace(getattr(kept, role), config=json.loads(json.dumps(getattr(kept, role).config)))}
    )
    again = build(kept, seed=2)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(batch_of(*POSTS)), together)


@pytest.mark.parametrize("kind", TEXTS)
def test_a_middle_layer_says_what_it_says_below_the_others(kind: str, tmp_path: Path) -> None:
    """Whatever an encoder does after its last layer, it does not do after one in the middle."""
    whole = save(kind, TEXTS[kind][0], tmp_path)
    if whole.config.is_encoder_decoder:
        whole = whole.get_encoder()
    source = getattr(whole, "text_model", whole)
    config = described("text", tmp_path)
    tower = build(replace(config, text=replace(config.text, layers=[1], fill=True))).text
    batch = batch_of(*POSTS)
    mask = batch.text_mask | ~batch.has_text[:, None]
    with torch.no_grad():
        every = source(input_ids=batch.input_ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
        assert (tower(batch.input_ids, mask) - every[1])[mask].abs().max() <= 1e-5


def test_a_dual_encoder_s_summaries_are_its_own(tmp_path: Path) -> None:
    """CLIP: the last token and the first; SigLIP: texts filled up, their last token, and the head over the patches."""
    poolings: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "clip": ({"pooling": "last"}, {"pooling": "first"}),
        "siglip": ({"pooling": "last", "fill": True}, {"pooling": "pooler"}),
        "siglip2": ({"pooling": "last", "fill": True}, {"pooling": "pooler"}),
    }
    for kind, (text, image) in poolings.items():
        folder = tmp_path / kind
        dual = save(kind, TEXTS[kind][0], folder)
        both = described("text", folder, **image)
        both = replace(both, modalities=["text", "image"], text=replace(both.text, max_length=16, **text))
        model = build(both)
        encode = PostEncoder(both, TAXONOMY)
        posts = [
            encode(RawSample({"id": str(n), "labels": {}}, text=words)) for n, words in enumerate(("ab", "abcdef"))
        ]
        posts = [replace(post, images=POSTS[0].images) for post in posts]
        batch = collate(posts, **encode.layout)
        pixels = model.normalise(batch.pixels)
        with torch.no_grad():
            said = model.read(batch)
            if kind == "clip":
                hidden = dual.text_model(batch.input_ids, attention_mask=batch.text_mask.long()).last_hidden_state
                words = torch.stack([hidden[0, 3], hidden[1, 7]])  # The end of two and of six bytes.
                look = dual.vision_model(pixels).last_hidden_state[:, 0]
            else:
                assert batch.input_ids.shape == (2, 16)
                words = dual.text_model(batch.input_ids).last_hidden_state[:, -1]
                inside = (
                    dual.vision_model(pixels)
                    if kind == "siglip"
                    else dual.vision_model(
                        patches_by_hand(pixels), torch.ones(2, 16, dtype=torch.int64), torch.full((2, 2), 4)
                    )
                )
                look = inside.pooler_output
        assert (said["text"].summary - words).abs().max() <= 1e-6, kind
        assert (said["image"].summary - look).abs().max() <= 1e-6, kind
        assert (said["text"].summary[0] - said["text"].summary[1]).abs().max() > 1e-4, kind


def test_a_checkpoint_without_a_pooler_is_the_same_whatever_the_seed(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(**WORDS), add_pooling_layer=False).save_pretrained(tmp_path)
    config = described("text", tmp_path)
    one, other = (build(config, seed).state_dict() for seed in (1, 2))
    differ = {name.partition(".")[0] for name in one if not torch.equal(one[name], other[name])}
    assert "text.encoder.pooler.dense.weight" in one
    assert differ == {"fusion"}


def patches_by_hand(pixels: torch.Tensor) -> torch.Tensor:
    """[N, 3, 32, 32] → 16 patches of 8 x 8 pixels, each written out by rows, columns and channels."""
    rows = [
        pixels[:, :, top : top + 8, left : left + 8].permute(0, 2, 3, 1).flatten(1)
        for top in range(0, SIZE, 8)
        for left in range(0, SIZE, 8)
    ]
    return torch.stack(rows, dim=1)


def test_a_checkpoint_in_the_wrong_place_is_refused(tmp_path: Path) -> None:
    save("vit", PICTURE, tmp_path / "vit")
    with pytest.raises(UserError, match=r"model\.text\.pretrained=.*vit: does not read input_ids; choose a model that"):
        build(described("text", tmp_path / "vit"))
    save("bert", WORDS, tmp_path / "bert")
    with pytest.raises(UserError, match=r"model\.image\.pretrained=.*bert: does not read pixel_values"):
        build(described("image", tmp_path / "bert"))
    save("siglip", {**DUAL, "vision_config": {**PICTURE, "vision_use_head": False}}, tmp_path / "headless")
    with pytest.raises(UserError, match=r"model\.image\.pooling=pooler: the encoder has none; choose mean or first"):
        build(described("image", tmp_path / "headless", pooling="pooler"))
    with pytest.raises(UserError, match=r"model\.text: canine embeds no token ids"):
        build(replace(model_config({"model_type": "canine", **TINY}), modalities=["text"]))
    save("siglip2", TEXTS["siglip2"][0], tmp_path / "naflex")
    config = described("image", tmp_path / "naflex")
    with pytest.raises(UserError, match=r"model\.image\.size=20: .*a multiple of its patches' side, 8"):
        build(replace(config, image=replace(config.image, size=20)))


# -- presets


def published(name: str) -> dict[str, Any]:
    """What `transformers` itself says of a family's published input: its defaults are the first checkpoint's."""
    from transformers import CLIPTextConfig, Dinov2Config, ModernBertConfig, SiglipTextConfig, SiglipVisionConfig
    from transformers.image_utils import (
        IMAGENET_DEFAULT_MEAN,
        IMAGENET_DEFAULT_STD,
        IMAGENET_STANDARD_MEAN,
        IMAGENET_STANDARD_STD,
        OPENAI_CLIP_MEAN,
        OPENAI_CLIP_STD,
    )

    families: dict[str, dict[str, Any]] = {
        "openai/clip": {
            "tokens": CLIPTextConfig().max_position_embeddings,
            "mean": OPENAI_CLIP_MEAN,
            "std": OPENAI_CLIP_STD,
            "size": 224,
            "patch": 32,
        },
        "google/siglip2": {
            "tokens": SiglipTextConfig().max_position_embeddings,
            "mean": IMAGENET_STANDARD_MEAN,
            "std": IMAGENET_STANDARD_STD,
            "size": SiglipVisionConfig().image_size,
            "patch": SiglipVisionConfig().patch_size,
        },
        "facebook/dino": {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "size": 224},
        "facebook/dinov2": {"patch": 14 if Dinov2Config().image_size == 224 else None},
        "facebook/dinov3": {"patch": 16},
        "jhu-clsp/mmBERT": {"tokens": ModernBertConfig().max_position_embeddings},
        # 514 positions, of which two come before the first token's.
        "intfloat/multilingual-e5": {"tokens": 512, "prefix": "query: "},
        "FacebookAI/xlm-roberta": {"tokens": 512},
        "microsoft/mdeberta-v3": {"tokens": 512},
        "sentence-transformers/clip-ViT-B-32-multilingual": {"tokens": 128},
    }
    found = [values for family, values in families.items() if name.startswith(family)]
    assert found, f"{name}: say here what was published of it"
    return {key: value for values in found for key, value in values.items()}


def test_presets_read_what_was_published() -> None:
    arguments = ["recipe=multilingual_text", "data.path=x"]
    models = {name: compose([*arguments, f"model={name}"]).model for name in group_choices("model") if name != "inline"}
    presets = {name: model for name, model in models.items() if model.has_pretrained}
    assert len(presets) >= 11
    for name, config in presets.items():
        known = published(str(config.text.pretrained))
        assert config.text.max_length <= known["tokens"], name
        assert config.text.prefix == known.get("prefix", ""), name
        if "image" in config.modalities:
            known = published(str(config.image.pretrained))
            assert (config.image.mean, config.image.std) == (known["mean"], known["std"]), name
            assert config.image.size == known["size"], name
            assert config.image.size % known["patch"] == 0, name
            assert config.modality_dropout > 0, name


def test_one_name_brings_both_towers_of_a_preset(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    config = compose(["recipe=memes", "data.path=x", "model=siglip2_base", f"model.text.pretrained={tmp_path}"])
    assert config.model.text.pretrained == config.model.image.pretrained == str(tmp_path)

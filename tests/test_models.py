"""The classifier: independent of padding and neighbours, whole gradients, absent and dropped modalities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import (
    BERT,
    BOTH,
    IMAGES,
    NEITHER,
    ONLY_IMAGES,
    ONLY_TEXT,
    POSTS,
    TAXONOMY,
    TEXTS,
    VIT,
    batch_of,
    build,
    model_config,
    post,
)
from torch import Tensor

from crossguard.configs.schema.encoders import TextEncoderConfig
from crossguard.configs.schema.model import ModelConfig
from crossguard.data.loading.collate import Batch
from crossguard.train.models import Classifier, build_model
from crossguard.train.models.modality_dropout import drop_modalities
from crossguard.train.models.tokens import Tokens, summarise
from crossguard.train.tokenizers import ByteTokenizer


@pytest.fixture(scope="module")
def model() -> Classifier:
    return build(model_config())


def encoders() -> list[Any]:
    texts = [pytest.param(config, VIT, id=f"{name}+vit") for name, config in TEXTS.items()]
    return texts + [pytest.param(BERT, config, id=f"bert+{name}") for name, config in IMAGES.items() if name != "vit"]


@pytest.mark.parametrize(("text", "image"), encoders())
def test_a_posts_logits_depend_neither_on_padding_nor_on_its_neighbours(
    text: dict[str, Any], image: dict[str, Any]
) -> None:
    model = build(model_config(text, image))
    with torch.no_grad():
        alone = torch.cat([model(batch_of(post)) for post in POSTS])
        together = model(batch_of(*POSTS))
        reversed_order = model(batch_of(*reversed(POSTS))).flip(0)
        no_image_at_all = model(batch_of(ONLY_TEXT, NEITHER))
    assert together.dtype == torch.float32
    assert torch.isfinite(together).all()
    assert (together - alone).abs().max() <= 1e-5
    assert (reversed_order - alone).abs().max() <= 1e-5
    assert (no_image_at_all - alone[[1, 4]]).abs().max() <= 1e-5
    # The posts are told apart: agreement is not that of a constant.
    assert torch.pdist(alone).min() > 1e-3


@pytest.mark.parametrize(("text", "image"), encoders())
def test_every_trainable_parameter_gets_a_gradient_whatever_the_batch_lacks(
    text: dict[str, Any], image: dict[str, Any]
) -> None:
    model = build(model_config(text, image)).train()
    for posts in ([BOTH], [ONLY_TEXT, NEITHER], [ONLY_IMAGES, NEITHER]):
        model.zero_grad(set_to_none=True)
        model(batch_of(*posts)).square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert torch.isfinite(parameter.grad).all(), name
            else:
                assert parameter.grad is None, name


def test_batch_normalisation_keeps_its_statistics_in_training() -> None:
    model = build(model_config(image=IMAGES["mobilevit"])).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert any(name.endswith("running_mean") for name in before)
    alone = torch.cat([model.image(batch_of(post).pixels.float() / 255) for post in (BOTH, ONLY_IMAGES)])
    together = model.image(batch_of(BOTH, ONLY_IMAGES).pixels.float() / 255)
    assert (alone - together).abs().max() <= 1e-5
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_an_absent_modality_is_a_learned_token_and_moves_no_tower(model: Classifier) -> None:
    model.zero_grad(set_to_none=True)
    model(batch_of(ONLY_TEXT)).square().sum().backward()
    assert all(not p.grad.any() for p in model.image.parameters() if p.grad is not None)
    assert model.fusion.absent["image"].grad.any()
    assert not model.fusion.absent["text"].grad.any()
    model.zero_grad(set_to_none=True)
    model(batch_of(ONLY_IMAGES)).square().sum().backward()
    assert all(not p.grad.any() for p in model.text.parameters() if p.grad is not None)
    assert model.fusion.absent["text"].grad.any()


def test_every_image_of_a_post_counts(model: Classifier) -> None:
    one_less = replace(ONLY_IMAGES, images=ONLY_IMAGES.images[:1])
    with torch.no_grad():
        assert (model(batch_of(ONLY_IMAGES)) - model(batch_of(one_less))).abs().max() > 1e-4


def test_fresh_weights_depend_on_configuration_and_seed_alone() -> None:
    config = model_config()

    def weights(seed: int) -> dict[str, Tensor]:
        return build_model(config, TAXONOMY, ByteTokenizer(), seed).state_dict()

    torch.manual_seed(1)
    first = weights(seed=7)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = weights(seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = weights(seed=8)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_new_model_gives_every_policy_one_half_and_is_ready_to_train() -> None:
    model = build_model(model_config(), TAXONOMY, ByteTokenizer(), 0)
    assert model.training
    assert all(module.training for module in model.modules())
    assert not model(batch_of(*POSTS)).any()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_the_logits_do_not_use_is_frozen() -> None:
    frozen = {name for name, p in build(model_config(image=IMAGES["siglip"])).named_parameters() if not p.requires_grad}
    assert frozen
    assert all(name.startswith(("text.encoder.pooler.", "image.encoder.head.")) for name in frozen)


def test_a_model_of_one_modality_has_no_tower_for_the_other() -> None:
    text_only = build(ModelConfig(modalities=["text"], text=TextEncoderConfig(config=BERT)))
    assert not any(name.startswith(("image", "fusion.factors")) for name, _ in text_only.named_parameters())
    with torch.no_grad():
        without_images = replace(BOTH, images=[])
        assert torch.equal(text_only(batch_of(BOTH)), text_only(batch_of(without_images)))
    image_only = build(replace(model_config(), modalities=["image"]))
    assert not any(name.startswith("text") for name, _ in image_only.named_parameters())
    with torch.no_grad():
        assert torch.equal(image_only(batch_of(BOTH)), image_only(batch_of(replace(BOTH, input_ids=None))))


def test_summaries_ignore_padding() -> None:
    tokens = torch.tensor([[[1.0], [3.0], [float("nan")]]])
    mask = torch.tensor([[True, True, False]])
    assert summarise(tokens, mask, "mean").item() == 2.0
    assert summarise(tokens, mask, "first").item() == 1.0
    assert summarise(tokens, torch.zeros_like(mask), "mean").item() == 0.0


# -- modality dropout


def dropped(batch: Batch, probability: float, seed: int) -> dict[str, str]:
    """Post id -> what it still has."""
    kept = drop_modalities(said_of(batch), batch.positions, probability, seed)
    return {
        id: "text" * bool(text) + "image" * bool(image)
        for id, text, image in zip(batch.ids, kept["text"].present, kept["image"].present, strict=True)
    }


def said_of(batch: Batch) -> dict[str, Tokens]:
    """As much of what towers say as modality dropout looks at."""
    nothing = torch.zeros(len(batch), 0, 4)
    return {
        name: Tokens(nothing, nothing[..., 0].bool(), torch.zeros(len(batch), 4), present)
        for name, present in (("text", batch.has_text), ("image", batch.has_image))
    }


def test_modality_dropout_depends_on_position_and_seed_alone() -> None:
    posts = [post(number, 3, 1 + number % 2) for number in range(200)]
    whole = dropped(batch_of(*posts), 0.5, seed=3)
    torch.manual_seed(99)
    parts: dict[str, str] = {}
    for start in range(0, 200, 8):
        parts |= dropped(batch_of(*reversed(posts[start : start + 8])), 0.5, seed=3)
    assert parts == whole
    assert dropped(batch_of(*posts), 0.5, seed=4) != whole
    counts = [list(whole.values()).count(kept) for kept in ("textimage", "text", "image")]
    assert counts[0] == pytest.approx(100, abs=30)
    assert counts[1] == pytest.approx(50, abs=25)
    assert set(dropped(batch_of(*posts), 1.0, seed=3).values()) == {"text", "image"}
    assert set(dropped(batch_of(*posts), 0.0, seed=3).values()) == {"textimage"}


def test_modality_dropout_takes_a_whole_modality_and_never_the_only_one() -> None:
    batch = batch_of(*POSTS)
    before = batch.has_text.clone()
    for seed in range(20):
        kept = drop_modalities(said_of(batch), batch.positions, 1.0, seed)
        text, image = kept["text"].present, kept["image"].present
        assert torch.equal(text | image, batch.has_text | batch.has_image)
        assert not (text & image).any()
    assert torch.equal(batch.has_text, before)


def test_a_dropped_modality_is_as_good_as_absent_and_only_in_training() -> None:
    model = build(model_config(modality_dropout=1.0))
    posts = [post(number, 4, 2) for number in range(6)]
    batch = batch_of(*posts)
    with torch.no_grad():
        both = model(batch)
        # BERT and ViT of this test have no dropout of their own.
        model.train()
        lost = model(batch)
        kept = dropped(batch, 1.0, model.seed)
        bare = [replace(p, input_ids=None) if kept[p.id] == "image" else replace(p, images=[]) for p in posts]
        model.eval()
        assert set(kept.values()) == {"text", "image"}
        assert (lost - model(batch_of(*bare))).abs().max() <= 1e-5
        assert torch.equal(model(batch), both)
        assert (lost - both).abs().amax(1).min() > 1e-4

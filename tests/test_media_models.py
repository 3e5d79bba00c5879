"""Classifiers that look at videos, listen, and read more than the caption."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from media_posts import BINS, WAV2VEC2, WHISPER, XLS_R, layout, media_config, media_post, media_posts
from tiny_models import TAXONOMY, VIT, batch_of, build, model_config
from torch import nn

from crossguard.configs.errors import UserError
from crossguard.configs.schema.audio import AudioEncoderConfig
from crossguard.configs.schema.model import ModelConfig
from crossguard.data.loading.clips import Clip
from crossguard.train.models import Classifier, build_model, without_pretrained
from crossguard.train.models.activations import checkpoint_activations
from crossguard.train.models.audio import build_audio_tower
from crossguard.train.models.modality_dropout import drop_modalities
from crossguard.train.tokenizers import load_tokenizer

CONFIGS = {
    "shared image encoder, whisper": media_config(),
    "own encoder of frames, xls-r": media_config(XLS_R, own=True),
    "wav2vec2 that normalises over time": media_config(WAV2VEC2),
}


def talkative(config: ModelConfig) -> Classifier:
    """A model in which nothing is zero any more."""
    model = build(config)
    torch.manual_seed(4)
    for module in (model.frames, model.hearing, model.segments):
        assert module is not None
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_depend_neither_on_padding_nor_on_neighbours(config: ModelConfig) -> None:
    model, posts = talkative(config), media_posts(config)
    with torch.no_grad():
        alone = torch.cat([model(batch_of(post, **layout(config))) for post in posts])
        together = model(batch_of(*posts, **layout(config)))
        backwards = model(batch_of(*reversed(posts), **layout(config))).flip(0)
    assert torch.isfinite(together).all()
    assert (together - alone).abs().max() <= 2e-5
    assert (together - backwards).abs().max() <= 2e-5
    for name, changed in (("clip", posts[2].clip), ("sound", posts[1].sound)):
        assert changed is not None
        with torch.no_grad():
            other = model(batch_of(*[replace(post, **{name: None}) for post in posts], **layout(config)))
        moved = (other - together).abs().amax(1) > 1e-4
        assert moved.tolist() == [getattr(post, name) is not None for post in posts]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_parameter_gets_a_gradient_from_every_batch(config: ModelConfig) -> None:
    model = build_model(config, TAXONOMY, load_tokenizer(config.text), seed=1)
    nn.init.normal_(model.heads.main.logits.weight)
    full, *_, nothing, _ = media_posts(config)
    for post, zero in ((full, False), (nothing, True)):
        model.zero_grad()
        model(batch_of(post, **layout(config))).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert [name for name, gradient in gradients.items() if gradient is None] == []
        for part in ("frames", "hearing", "audio", "video", "segments"):
            found = [g.abs().max() for name, g in gradients.items() if name.startswith(f"{part}.") and g is not None]
            assert all(torch.isfinite(g) for g in found)
            if found:
                assert (max(found) == 0) == zero, part
    assert hasattr(model, "video") == (not config.shares_image_encoder)
    checkpoint_activations(model)
    kept = {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}
    model.zero_grad()
    model(batch_of(nothing, **layout(config))).sum().backward()
    assert all(torch.equal(kept[name], p.grad) for name, p in model.named_parameters() if p.grad is not None)


def test_frames_know_when_they_are_shown() -> None:
    config = media_config()
    model, post = talkative(config), media_post(config, 1, 0, 0, 3, 0)
    assert post.clip is not None
    later = replace(post, clip=Clip(post.clip.frames, post.clip.times + 5))
    fresh = build(config)
    with torch.no_grad():
        first, second = (model(batch_of(p, **layout(config))) for p in (post, later))
        assert (first - second).abs().max() > 1e-3
        # At first a video is the mean of its frames.
        assert torch.equal(*(fresh(batch_of(p, **layout(config))) for p in (post, later)))


def test_frames_are_pooled_as_their_encoder_says() -> None:
    config = media_config()
    mean, first = (
        build(replace(config, image=replace(config.image, pooling=pooling))) for pooling in ("mean", "first")
    )
    batch = batch_of(media_post(config, 1, 0, 0, 3, 0), **layout(config))
    assert batch.video is not None
    with torch.no_grad():
        looks = mean.image(mean.normalise(batch.video.pixels))
        assert (mean.read(batch)["video"].values[0, :3] - looks.mean(1)).abs().max() < 1e-5
        assert (first.read(batch)["video"].values[0, :3] - looks[:, 0]).abs().max() < 1e-5
        assert (looks.mean(1) - looks[:, 0]).abs().max() > 1e-3


def test_fields_change_nothing_before_they_are_learned() -> None:
    config = media_config()
    without = replace(config, text=replace(config.text, fields={}))
    model, plain = build(config), build(without)
    loaded = plain.load_state_dict(model.state_dict(), strict=False)
    assert loaded.unexpected_keys == ["segments.scale.weight", "segments.shift.weight"]
    posts, learned = media_posts(config), talkative(config)
    with torch.no_grad():
        assert torch.equal(model(batch_of(*posts, **layout(config))), plain(batch_of(*posts, **layout(without))))
        fields = [replace(p, segments=None if p.segments is None else 2 - p.segments) for p in posts]
        one, other = (learned(batch_of(*some, **layout(config))) for some in (posts, fields))
    assert ((one - other).abs().amax(1) > 1e-4).tolist() == [bool(p.input_ids is not None) for p in posts]


# -- modality dropout


def test_any_modalities_may_be_dropped_but_never_all() -> None:
    config = media_config()
    sizes = list(itertools.product((0, 3), (0, 1), (0, 2), (0, 20))) * 3
    posts = [media_post(config, number, *size) for number, size in enumerate(sizes)]
    batch = batch_of(*posts, **layout(config))
    assert batch.video is not None
    assert batch.audio is not None
    batch.positions = torch.arange(len(batch))
    has = torch.stack([batch.has_text, batch.has_image, batch.video.present, batch.audio.present], dim=1)
    kept_sets: dict[tuple[bool, ...], int] = {}
    model = build(replace(config, modality_dropout=1.0))
    with torch.no_grad():
        said = model.read(batch)
    for seed in range(200):
        kept = drop_modalities(said, batch.positions, 1.0, seed)
        left = torch.stack([tokens.present for tokens in kept.values()], dim=1)
        assert not (left & ~has).any()
        several = has.sum(1) > 1
        assert torch.equal(left[~several], has[~several])
        assert ((left.sum(1) >= 1) & (left.sum(1) < has.sum(1)))[several].all()
        for row in left[has.all(1)].tolist():
            kept_sets[tuple(row)] = kept_sets.get(tuple(row), 0) + 1
    assert len(kept_sets) == 14
    mean = sum(kept_sets.values()) / 14
    assert all(abs(count - mean) < 5 * mean**0.5 for count in kept_sets.values())
    with torch.no_grad():
        lost = model.train()(batch)
        reference = model.eval().judge(drop_modalities(said, batch.positions, 1.0, model.seed))
        assert torch.equal(reference, lost)


# -- encoders of sound


def test_of_a_pretrained_whisper_the_encoder_alone_is_used(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import WhisperConfig, WhisperModel

    values = {name: value for name, value in WHISPER.items() if name != "model_type"}
    torch.manual_seed(8)
    saved = WhisperModel(
        WhisperConfig(**values, num_mel_bins=BINS, max_source_positions=50, encoder_layerdrop=0.5)  # type: ignore[arg-type]
    )
    saved.save_pretrained(tmp_path / "whisper")
    config = media_config()
    config = replace(config, audio=replace(config.audio, config={}, pretrained=str(tmp_path / "whisper")))
    model = build(config)
    weights = load_file(tmp_path / "whisper" / "model.safetensors")
    assert torch.equal(model.audio.encoder.conv1.weight, next(w for n, w in weights.items() if "conv1.weight" in n))
    assert not any("decoder" in name for name, _ in model.audio.named_parameters())
    assert model.audio.encoder.config.encoder_layerdrop == 0
    described = without_pretrained(config, model)
    assert described.audio.pretrained is None
    again = build(described, seed=9)
    again.load_state_dict(model.state_dict())
    batch = batch_of(*media_posts(config), **layout(config))
    with torch.no_grad():
        assert torch.equal(again(batch), model(batch))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"features": "waveform", "config": WHISPER}, r"model\.audio\.features=waveform: not what .* whisper reads"),
        ({"config": WAV2VEC2}, r"model\.audio\.features=log_mel: not what .* wav2vec2 reads; log_mel for Whisper"),
        (
            {"config": {**WHISPER, "num_mel_bins": 9}},
            r"model\.audio\.mel_bins=80: .* for 9; set model\.audio\.mel_bins=9",
        ),
        (
            {"config": {**WHISPER, "max_source_positions": 150}},
            r"max_seconds=30\.0: the encoder was made for 3\.0; set",
        ),
        ({"config": {**WHISPER, "encoder_layerdrop": 0.1}}, r"encoder_layerdrop: draws differently on every rank"),
        ({"config": VIT}, r"model_type=vit: does not read input_features or input_values; .* encodes sound"),
    ],
)
def test_an_encoder_of_sound_that_does_not_fit_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_audio_tower(AudioEncoderConfig(**values))


def test_a_video_encoder_that_is_not_described_is_the_image_encoder() -> None:
    config = media_config()
    assert config.shares_image_encoder
    assert list(config.encoders) == ["text", "image", "audio"]
    alone = replace(config, modalities=["video"])
    assert not alone.shares_image_encoder
    assert alone.encoders == {"video": config.image}
    model = build(alone)
    assert model.towers == ("video",)
    with pytest.raises(UserError, match=r"model\.video\.size=32: without an encoder of its own .*leave it out"):
        replace(config, image=replace(config.image, size=16), video=replace(config.video, size=32))
    with pytest.raises(UserError, match=r"model\.audio: set one of pretrained, config, build"):
        replace(config, audio=AudioEncoderConfig())
    with pytest.raises(UserError, match="text, image, video, audio|did you mean 'video'"):
        replace(model_config(), modalities=["vidio"])

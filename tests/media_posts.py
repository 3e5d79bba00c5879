"""Tiny encoders of frames and sound, and posts with every modality as numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tiny_models import TINY, VIT, model_config, post

from crossguard.configs.schema.audio import AudioEncoderConfig
from crossguard.configs.schema.model import ModelConfig
from crossguard.configs.schema.video import VideoEncoderConfig
from crossguard.data.loading.clips import Clip
from crossguard.data.loading.encoded import EncodedSample

BINS, FRAMES, SECONDS = 8, 4, 1.0
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
WHISPER = {
    "model_type": "whisper",
    "d_model": 16,
    "vocab_size": 8,
    **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 16 for part in ("encoder", "decoder")},
    **dict.fromkeys(_IDS, 0),
}
WAV2VEC2 = {
    "model_type": "wav2vec2",
    **TINY,
    "num_hidden_layers": 1,
    "conv_dim": [8, 8],
    "conv_kernel": [40, 32],
    "conv_stride": [20, 16],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0),
}
XLS_R = {**WAV2VEC2, "feat_extract_norm": "layer", "do_stable_layer_norm": True}
FIELDS = {"ocr": 8, "comments": 12}


def media_config(audio: dict[str, Any] = WHISPER, own: bool = False, **values: Any) -> ModelConfig:
    """All four modalities; with `own`, frames have an encoder of their own."""
    base = model_config()
    waveform = audio["model_type"] == "wav2vec2"
    return replace(
        base,
        modalities=["text", "image", "video", "audio"],
        text=replace(base.text, max_length=100, fields=FIELDS),
        video=VideoEncoderConfig(config=VIT if own else {}, size=16 if own else 64, frames=FRAMES),
        audio=AudioEncoderConfig(
            config=audio, features="waveform" if waveform else "log_mel", mel_bins=BINS, max_seconds=SECONDS
        ),
        **values,
    )


def layout(config: ModelConfig) -> dict[str, Any]:
    """What `batch_of` needs for a model."""
    if "video" not in config.modalities:
        return {}
    waveform = config.audio.features == "waveform"
    return {
        "frame_size": config.frame_encoder.size,
        "silence": np.zeros(16_000 if waveform else (BINS, 100), dtype=np.float32),
    }


def media_post(
    config: ModelConfig, number: int, tokens: int, images: int, frames: int, hundredths: int
) -> EncodedSample:
    """A post with so much of each modality; the sound's length is in hundredths of a second."""
    draw = np.random.default_rng(1000 + number)
    side = config.frame_encoder.size
    pictures = [draw.integers(0, 256, (side, side, 3)).astype(np.uint8) for _ in range(frames)]
    times = np.cumsum(draw.random(frames)).astype(np.float32)
    shape = (hundredths * 160,) if config.audio.features == "waveform" else (BINS, hundredths)
    sound = draw.normal(size=shape).astype(np.float32)
    if sound.ndim == 2:
        sound[:, -1:] = -1.0
    return replace(
        post(number, tokens, images),
        segments=np.sort(draw.integers(0, 3, tokens)).astype(np.uint8) if tokens else None,
        clip=Clip(pictures, times) if frames else None,
        sound=sound if hundredths else None,
    )


# Tokens, images, frames and hundredths of a second.
SIZES = [(5, 1, 4, 80), (9, 0, 0, 100), (0, 0, 2, 0), (60, 3, 0, 0), (0, 0, 0, 57), (0, 0, 0, 0), (3, 0, 1, 12)]


def media_posts(config: ModelConfig) -> list[EncodedSample]:
    return [media_post(config, number, *size) for number, size in enumerate(SIZES)]

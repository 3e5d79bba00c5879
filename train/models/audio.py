"""The audio tower: encoders of spectrograms (Whisper) or waveforms (wav2vec 2.0 and its kin), or the user's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from crossguard.configs.errors import UserError
from crossguard.configs.schema.audio import LOG_MEL, SAMPLE_RATE, AudioEncoderConfig
from crossguard.train.models.hugging_face import RANDOM, load_encoder, new_encoder
from crossguard.train.models.pieces import AttentionPool, by_post
from crossguard.train.models.tower import Tower, build_own_tower

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Both families make fifty tokens of a second: so many become one, by their mean.
TOKENS_TOGETHER = 25


class SpectrogramTower(Tower):
    """Whisper's encoder, which always reads spectrograms of one length."""

    def __init__(self, encoder: PreTrainedModel):
        super().__init__()
        self.encoder = encoder
        self.width = int(encoder.config.hidden_size)
        self.frames = 2 * int(encoder.config.max_source_positions)

    def forward(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """float[A, bins, T] and int64[A], their frames that count → float[A, W, width] and bool[A, W]."""
        # A recording goes on in silence, as it ends.
        silence = values[:, :, -1:].expand(-1, -1, self.frames - values.shape[2])
        hidden = self.encoder(input_features=torch.cat([values, silence], dim=2)).last_hidden_state
        return _together(hidden, (lengths + 1) // 2)


class WaveformTower(Tower):
    """wav2vec 2.0 (arXiv 2006.11477), XLS-R, HuBERT, WavLM."""

    def __init__(self, encoder: PreTrainedModel, samples: int):
        """
        Args:
            encoder: of `transformers`.
            samples: of the longest recording.
        """
        super().__init__()
        self.encoder: Any = encoder
        self.width = int(encoder.config.hidden_size)
        # Some normalise over time before they look at a mask: for them, all recordings are made equally long.
        self.samples = samples if getattr(encoder.config, "feat_extract_norm", "layer") == "group" else None

    def forward(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """float[A, T] and int64[A], their samples that count → float[A, W, width] and bool[A, W]."""
        if self.samples is not None:
            hidden = self.encoder(F.pad(values, (0, self.samples - values.shape[1]))).last_hidden_state
        else:
            places = torch.arange(values.shape[1], device=values.device)
            hidden = self.encoder(values, attention_mask=(places < lengths[:, None]).long()).last_hidden_state
        return _together(hidden, self.encoder._get_feat_extract_output_lengths(lengths))


def _together(hidden: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Means over windows of 25 tokens, of those that count: float[A, T, D], int64[A] → float[A, W, D], bool[A, W]."""
    hidden = F.pad(hidden, (0, 0, 0, -hidden.shape[1] % TOKENS_TOGETHER))
    mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
    windows = torch.where(mask[:, :, None], hidden, 0.0).unflatten(1, (-1, TOKENS_TOGETHER))
    counts = mask.unflatten(1, (-1, TOKENS_TOGETHER)).sum(2)
    return windows.sum(2) / counts.clamp(min=1)[:, :, None], counts > 0


class Hearing(torch.nn.Module):
    """Recordings as their tower hears them → the tokens of the posts, and attention over them."""

    def __init__(self, width: int):
        super().__init__()
        self.pool = AttentionPool(width)

    def forward(self, heard: Tensor, mask: Tensor, post: Tensor, num_posts: int) -> tuple[Tensor, Tensor, Tensor]:
        """float[A, W, D], bool[A, W] and int64[A], the post of each recording (-1: of none) → values, mask and summary
        of the `Tokens` of B posts."""
        values, there = by_post(heard, post, num_posts, 1)
        row = torch.where(post < 0, num_posts, post)
        tokens = mask.new_zeros(num_posts + 1, mask.shape[1]).index_put((row,), mask)[:num_posts] & there
        return values, tokens, self.pool(values, tokens)


def build_audio_tower(config: AudioEncoderConfig) -> Tower:
    """The audio tower that a configuration names.

    An encoder of the user's own (`build: module:function`) is called with `config` and returns a module whose
    `forward(values float[A, bins, T] or float[A, T], lengths int64[A])` gives float[A, W, width] and bool[A, W], the
    tokens that count, and whose attribute `width` says how wide. The output for a recording must not depend on the
    others, nor on what lies behind its length.

    Raises:
        UserError: no such encoder, or it reads something else.
    """
    if config.build:
        return build_own_tower(config.build, "model.audio.build", config)
    encoder = (
        load_encoder(config.pretrained, "audio")
        if config.pretrained
        else new_encoder(config.config, _defaults(config), "audio")
    )
    for name, value in RANDOM.items():
        if getattr(encoder.config, name, value) != value:
            raise UserError(f"model.audio.config.{name}: draws differently on every rank; leave it out")
    reads_mel = hasattr(encoder.config, "num_mel_bins") and hasattr(encoder.config, "max_source_positions")
    if reads_mel != (config.features == LOG_MEL) or not (reads_mel or hasattr(encoder.config, "conv_kernel")):
        known = "log_mel for Whisper, waveform for wav2vec 2.0, HuBERT, WavLM and XLS-R"
        raise UserError(
            f"model.audio.features={config.features}: not what an encoder of type {encoder.config.model_type} reads; "
            f"{known}"
        )
    if not reads_mel:
        return WaveformTower(encoder, round(config.max_seconds * SAMPLE_RATE))
    _check_fits(encoder.config, config)
    return SpectrogramTower(encoder)


def _defaults(config: AudioEncoderConfig) -> dict[str, Any]:
    return {"num_mel_bins": config.mel_bins, "max_source_positions": config.positions, **RANDOM}


def _check_fits(made_for: Any, config: AudioEncoderConfig) -> None:
    if made_for.num_mel_bins != config.mel_bins:
        raise UserError(
            f"model.audio.mel_bins={config.mel_bins}: the encoder was made for {made_for.num_mel_bins}; set "
            f"model.audio.mel_bins={made_for.num_mel_bins}"
        )
    if made_for.max_source_positions != config.positions:
        seconds = made_for.max_source_positions / 50
        raise UserError(
            f"model.audio.max_seconds={config.max_seconds}: the encoder was made for {seconds}; set "
            f"model.audio.max_seconds={seconds}"
        )

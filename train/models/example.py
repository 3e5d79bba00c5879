"""Batches of given sizes that say nothing: to find out what a model makes of their shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crossguard.configs.schema.audio import FRAMES_PER_SECOND, LOG_MEL, SAMPLE_RATE
from crossguard.configs.schema.model import ModelConfig
from crossguard.data.loading.collate import Batch, Frames, Sound


@dataclass(frozen=True)
class PostSize:
    """How much there is of each modality in a post."""

    tokens: int = 1
    images: int = 1
    frames: int = 1
    recordings: int = 1
    # Of a recording.
    seconds: float = 1.0
    ngrams: int = 1

    @classmethod
    def largest(cls, config: ModelConfig) -> PostSize:
        """The most that a model looks at."""
        return cls(
            tokens=config.text.length,
            images=config.image.max_images,
            frames=config.video.frames,
            seconds=config.audio.max_seconds,
            ngrams=config.ngrams.max_characters * (config.ngrams.max_n - config.ngrams.min_n + 1),
        )


def example_batch(config: ModelConfig, num_labels: int, posts: int, size: PostSize, pad_id: int = 0) -> Batch:
    """A batch of `posts` that all have every modality of the model, each as much of it as `size` says; of modalities
    that the model does not look at, no more than every batch has."""
    tokens = size.tokens if "text" in config.modalities else 1
    images = posts * size.images if "image" in config.modalities else 1
    ngrams = size.ngrams if "ngrams" in config.modalities else 0
    yes = torch.ones(posts, dtype=torch.bool)
    return Batch(
        ids=["example"] * posts,
        languages=["und"] * posts,
        positions=torch.zeros(posts, dtype=torch.int64),
        input_ids=torch.full((posts, tokens), pad_id),
        text_mask=torch.ones(posts, tokens, dtype=torch.bool),
        has_text=yes,
        ngrams=torch.zeros(posts * ngrams, dtype=torch.int32),
        ngram_starts=torch.arange(posts, dtype=torch.int32) * ngrams,
        pixels=_pixels(images, config.image.size),
        image_post=_owners(posts, images),
        has_image=yes,
        labels=torch.zeros(posts, num_labels),
        segments=torch.zeros(posts, tokens, dtype=torch.int64) if config.text.fields else None,
        video=_frames(config, posts, size.frames) if "video" in config.modalities else None,
        audio=_sound(config, posts, size) if "audio" in config.modalities else None,
    )


def _frames(config: ModelConfig, posts: int, frames: int) -> Frames:
    return Frames(
        pixels=_pixels(posts * frames, config.frame_encoder.size),
        times=torch.zeros(posts * frames),
        post=_owners(posts, posts * frames),
        present=torch.ones(posts, dtype=torch.bool),
    )


def _sound(config: ModelConfig, posts: int, size: PostSize) -> Sound:
    seconds, count = min(size.seconds, config.audio.max_seconds), posts * size.recordings
    if config.audio.features == LOG_MEL:
        values = torch.zeros(count, config.audio.mel_bins, round(seconds * FRAMES_PER_SECOND))
    else:
        values = torch.zeros(count, round(seconds * SAMPLE_RATE))
    return Sound(
        values=values,
        lengths=torch.full((count,), values.shape[-1]),
        post=_owners(posts, count),
        present=torch.ones(posts, dtype=torch.bool),
    )


def _pixels(count: int, side: int) -> torch.Tensor:
    return torch.zeros(count, 3, side, side, dtype=torch.uint8)


def _owners(posts: int, pieces: int) -> torch.Tensor:
    """int64[pieces]: the same number of pieces for every post, in order."""
    return torch.arange(pieces) // max(1, pieces // posts)

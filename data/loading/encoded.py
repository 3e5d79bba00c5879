"""A post as numbers, the function that makes one, and many of them side by side. What the processes that read need;
they never import torch, which would take seconds and more memory than everything else they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import numpy as np

from crossguard.data.loading.clips import Clip

if TYPE_CHECKING:
    from crossguard.data.loading.sample import RawSample

NO_POST = -1
# Outside training.
NO_POSITION = -1


@dataclass(slots=True)
class EncodedSample:
    """One post as numbers."""

    id: str
    language: str
    # int32[L], L ≥ 1; None when the post has no text.
    input_ids: np.ndarray | None
    # Each uint8[3, S, S], RGB.
    images: list[np.ndarray]
    # float32[P] in [0, 1]; NaN is unknown.
    labels: np.ndarray
    # In the sample order.
    position: int = NO_POSITION
    # uint8[L]: the field that each token is of, 0 for the caption; None where only captions are read.
    segments: np.ndarray | None = None
    # None when the post has no video.
    clip: Clip | None = None
    # float32[T], a waveform, or float32[bins, T], a spectrogram that ends in silence; None when nothing can be heard.
    sound: np.ndarray | None = None
    # int32[L]: what is written, in a disguise, L = 0 where there is nothing; None where nobody asks for it.
    disguised: np.ndarray | None = None
    # uint8[L]: the same of it as `segments`.
    disguised_segments: np.ndarray | None = None
    # int32[K]: hashed character n-grams of what is written, K ≥ 0; None when nothing is or they are not read.
    ngrams: np.ndarray | None = None


class Layout(TypedDict):
    """The arguments of `stack`."""

    pad_id: int
    image_size: int
    num_labels: int
    frame_size: int | None
    silence: np.ndarray | None


class Encode(Protocol):
    """Turns a post into numbers. Picklable: it is sent to the processes that read."""

    @property
    def fingerprint(self) -> str:
        """Changes when any token, pixel or label of any post could change."""
        ...

    @property
    def layout(self) -> Layout:
        """What `stack` needs to lay its samples side by side."""
        ...

    def __call__(self, raw: RawSample, position: int = NO_POSITION) -> EncodedSample:
        """Encode one post that comes at `position` of the sample order; raises `MediaError` when its media cannot be
        decoded."""
        ...

    def text_length(self, raw: RawSample) -> int:
        """Number of tokens that the encoded post will have; 0 without text."""
        ...


def stack(
    samples: Sequence[EncodedSample],
    *,
    pad_id: int,
    image_size: int,
    num_labels: int,
    frame_size: int | None = None,
    silence: np.ndarray | None = None,
) -> dict[str, Any]:
    """The fields of a `Batch`: arrays in place of tensors, texts padded to the longest, and in place of the pixels a
    list of images uint8[S, S, 3], which are laid side by side once, where the batch is to be.

    Args:
        samples: at least one.
        pad_id: token id that fills rows up.
        image_size: side S of the images, for a batch that has none.
        num_labels: length L of the label vectors.
        frame_size: side of videos' frames, for a batch that has none; None where videos are not looked at.
        silence: for a batch without sound; None where nothing is listened to.
    """
    input_ids, text_mask = pad_texts([sample.input_ids for sample in samples], pad_id)
    images = [(row, image.transpose(1, 2, 0)) for row, sample in enumerate(samples) for image in sample.images]
    images = images or [(NO_POST, _black(image_size))]
    labels = np.stack([sample.labels for sample in samples]).astype(np.float32, copy=False)
    if labels.shape != (len(samples), num_labels):
        raise ValueError(f"labels have shape {labels.shape[1:]}, the taxonomy has {num_labels} labels")
    arrays = {
        "ids": [sample.id for sample in samples],
        "languages": [sample.language for sample in samples],
        "positions": np.array([sample.position for sample in samples], dtype=np.int64),
        "input_ids": input_ids,
        "text_mask": text_mask,
        "has_text": np.array([sample.input_ids is not None or sample.ngrams is not None for sample in samples]),
        **_join_ngrams(samples),
        "pixels": [image for _, image in images],
        "image_post": np.array([row for row, _ in images], dtype=np.int64),
        "has_image": np.array([bool(sample.images) for sample in samples]),
        "labels": labels,
        "segments": _pad_segments([sample.segments for sample in samples], input_ids.shape),
        "video": None if frame_size is None else _stack_frames(samples, frame_size),
        "audio": None if silence is None else _stack_sound(samples, silence),
    }
    if samples[0].disguised is not None:  # Then all have one.
        ids, mask = pad_texts([sample.disguised for sample in samples], pad_id)
        segments = _pad_segments([sample.disguised_segments for sample in samples], ids.shape)
        arrays |= {"disguised_ids": ids, "disguised_mask": mask, "disguised_segments": segments}
    return arrays


def _black(size: int) -> np.ndarray:
    return np.zeros((size, size, 3), dtype=np.uint8)


def _stack_frames(samples: Sequence[EncodedSample], size: int) -> dict[str, Any]:
    clips = [(row, sample.clip) for row, sample in enumerate(samples) if sample.clip is not None]
    clips = clips or [(NO_POST, Clip([_black(size)], np.zeros(1, dtype=np.float32)))]
    return {
        "pixels": [frame for _, clip in clips for frame in clip.frames],
        "times": np.concatenate([clip.times for _, clip in clips]),
        "post": np.array([row for row, clip in clips for _ in clip.frames], dtype=np.int64),
        "present": np.array([sample.clip is not None for sample in samples]),
    }


def _stack_sound(samples: Sequence[EncodedSample], silence: np.ndarray) -> dict[str, Any]:
    sounds = [(row, sample.sound) for row, sample in enumerate(samples) if sample.sound is not None]
    sounds = sounds or [(NO_POST, silence)]
    lengths = [sound.shape[-1] for _, sound in sounds]
    values = np.zeros((len(sounds), *silence.shape[:-1], max(lengths)), dtype=np.float32)
    for row, (_, sound) in enumerate(sounds):
        values[row, ..., : lengths[row]] = sound
        if sound.ndim == 2:  # A spectrogram goes on as it ends: in silence, which is no zero there.
            values[row, :, lengths[row] :] = sound[:, -1:]
    return {
        "values": values,
        "lengths": np.array(lengths, dtype=np.int64),
        "post": np.array([row for row, _ in sounds], dtype=np.int64),
        "present": np.array([sample.sound is not None for sample in samples]),
    }


def _pad_segments(every: Sequence[np.ndarray | None], shape: tuple[int, ...]) -> np.ndarray | None:
    if all(segments is None for segments in every):
        return None
    padded = np.zeros(shape, dtype=np.int64)
    for row, segments in enumerate(every):
        if segments is not None:
            padded[row, : len(segments)] = segments
    return padded


def _join_ngrams(samples: Sequence[EncodedSample]) -> dict[str, np.ndarray]:
    nothing = np.zeros(0, dtype=np.int32)
    bags = [nothing if sample.ngrams is None else sample.ngrams for sample in samples]
    ends = np.cumsum([len(bag) for bag in bags], dtype=np.int32)
    return {"ngrams": np.concatenate(bags), "ngram_starts": np.concatenate([[0], ends[:-1]]).astype(np.int32)}


def pad_texts(texts: Sequence[np.ndarray | None], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay token ids side by side: int64[N, L], filled up with the pad id, and bool[N, L], True where there is a token;
    L ≥ 1."""
    longest = max([1, *(len(text) for text in texts if text is not None)])
    input_ids = np.full((len(texts), longest), pad_id, dtype=np.int64)
    text_mask = np.zeros((len(texts), longest), dtype=bool)
    for row, text in enumerate(texts):
        if text is not None:
            input_ids[row, : len(text)] = text
            text_mask[row, : len(text)] = True
    return input_ids, text_mask

"""A batch: what the model reads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from crossguard.data.loading.encoded import EncodedSample, stack

# Batches whose memory is kept: one that is being made, one in use, and one between them.
MOST_RETURNED = 3
P = TypeVar("P", bound="Batch | Frames | Sound")


@dataclass(slots=True)
class Frames:
    """Frames of the videos of B posts: F in all."""

    # uint8[F, 3, S, S], F ≥ 1; one black frame when no post has a video. Channels lie last in memory.
    pixels: Tensor
    # float32[F]: seconds from the start of the video.
    times: Tensor
    # int64[F]: the post (0 … B-1) that each belongs to, frames in the order of time; -1 for the black one.
    post: Tensor
    # bool[B]: whether the post has a video.
    present: Tensor


@dataclass(slots=True)
class Sound:
    """What can be heard in B posts: A recordings, at most one of a post."""

    # float32[A, T], waveforms filled up with zeros, or float32[A, bins, T], spectrograms filled up with silence; A ≥ 1:
    # one of silence when there is nothing to be heard.
    values: Tensor
    # int64[A]: how much of T each has.
    lengths: Tensor
    # int64[A]: the post that each belongs to; -1 for the silent one.
    post: Tensor
    # bool[B]: whether there is something to be heard in the post.
    present: Tensor


@dataclass(slots=True)
class Batch:
    """B posts with N images in all. Every batch has tokens and an image, and a frame and a recording where the model
    looks at videos and listens, so that all ranks run the same modules."""

    ids: list[str]
    languages: list[str]
    # int64[B]: positions in the sample order.
    positions: Tensor
    # int64[B, L], L ≥ 1, filled up with the pad id.
    input_ids: Tensor
    # bool[B, L]: True where there is a token.
    text_mask: Tensor
    # bool[B]
    has_text: Tensor
    # int32[K]: the texts' hashed character n-grams one after the other, and int32[B]: where each text's begin.
    ngrams: Tensor
    ngram_starts: Tensor
    # uint8[N, 3, S, S], N ≥ 1; one black image when no post has any. Channels lie last in memory.
    pixels: Tensor
    # int64[N]: the post (0 … B-1) each image belongs to; -1 for the black one.
    image_post: Tensor
    # bool[B]
    has_image: Tensor
    # float32[B, P] in [0, 1]; NaN is unknown.
    labels: Tensor
    # int64[B, L]: the field of the post that each token is of, 0 for the caption; None where only captions are read.
    segments: Tensor | None = None
    # None where the model does not look at videos.
    video: Frames | None = None
    # None where it does not listen.
    audio: Sound | None = None
    # What a model's frozen part says of the posts, where that stands in for texts and media.
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    # int64[B, L] and bool[B, L]: the texts in disguise, where training compares them; no True where there is no text.
    disguised_ids: Tensor | None = None
    disguised_mask: Tensor | None = None
    # int64[B, L]: the same of the disguises as `segments`.
    disguised_segments: Tensor | None = None
    # int64[2·N, L] and bool[2·N, L]: N texts and their translations, where training aligns them; of no post.
    pair_ids: Tensor | None = None
    pair_mask: Tensor | None = None
    # float32[B, P] in [0, 1]: a teacher's scores; NaN where it gave none.
    teacher: Tensor | None = None

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> Batch:
        """What `stack` has made, copied: into page-locked memory where there is a GPU, to which copies from there run
        in the background."""
        values = _tensors(arrays)
        for name, part in (("video", Frames), ("audio", Sound)):
            if values.get(name) is not None:
                values[name] = part(**_tensors(values[name]))
        values["embeddings"] = _tensors(values.get("embeddings", {}))
        return cls(**values)

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return _moved(self, device)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of it."""
        yield from self.embeddings.values()
        for part in (self, self.video, self.audio):
            if part is not None:
                yield from (value for one in fields(part) if isinstance(value := getattr(part, one.name), Tensor))


def _moved(part: P, device: torch.device | str) -> P:
    """A batch or a part of one on `device`."""
    values: dict[str, Any] = {one.name: getattr(part, one.name) for one in fields(part)}
    for name, value in values.items():
        if isinstance(value, Tensor):
            values[name] = value.to(device, non_blocking=True)
        elif isinstance(value, Frames | Sound):
            values[name] = _moved(value, device)
        elif isinstance(value, dict):
            values[name] = {key: tensor.to(device, non_blocking=True) for key, tensor in value.items()}
    return type(part)(**values)


def collate(samples: Sequence[EncodedSample], **layout: Any) -> Batch:
    """A batch of samples; `layout` are the arguments of `stack`."""
    return Batch.of(stack(samples, **layout))


def _tensors(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The same with tensors of its own; lists of images uint8[S, S, 3] become pixels uint8[N, 3, S, S]."""
    values = dict(arrays)
    for name, value in arrays.items():
        if isinstance(value, np.ndarray):
            values[name] = _own(torch.from_numpy(value))
        elif name == "pixels":
            pixels = _memory((len(value), *value[0].shape))
            np.stack(value, out=pixels.numpy())
            values[name] = pixels.permute(0, 3, 1, 2)
    return values


def _own(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if _has_gpu() else tensor.clone()


def _memory(shape: tuple[int, ...]) -> Tensor:
    """uint8, uninitialised. The memory of batches that are gone is used again: new pages would come one by one,
    which takes longer than writing to them. (Page-locked memory is kept by torch.)"""
    if _has_gpu():
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
    size = math.prod(shape)
    fitting = [memory for memory in _Lease.returned if len(memory) >= size]
    _Lease.returned[:] = fitting[1:]
    memory = fitting[0] if fitting else np.empty(size, dtype=np.uint8)
    return torch.from_numpy(np.asarray(_Lease(memory))[:size].reshape(shape))


class _Lease:
    """Memory that returns when the last array or tensor that lies in it is gone."""

    returned: ClassVar[list[np.ndarray]] = []

    def __init__(self, memory: np.ndarray):
        self.memory = memory
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        if len(self.returned) < MOST_RETURNED:
            self.returned.append(self.memory)


@cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()

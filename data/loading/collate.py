"""A batch: what the model reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from crossguard.data.loading.encoded import EncodedSample, stack

# Batches whose memory is kept: one that is being made, one in use, and one between them.
MOST_RETURNED = 3


@dataclass(slots=True)
class Batch:
    """B posts with N images in all. Every batch has tokens and an image, so that all ranks run the same modules."""

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
    # uint8[N, 3, S, S], N ≥ 1; one black image when no post has any. Channels lie last in memory.
    pixels: Tensor
    # int64[N]: the post (0 … B-1) each image belongs to; -1 for the black one.
    image_post: Tensor
    # bool[B]
    has_image: Tensor
    # float32[B, P] in [0, 1]; NaN is unknown.
    labels: Tensor
    # int64[B, L] and bool[B, L]: the texts in disguise, where training compares them; no True where there is no text.
    disguised_ids: Tensor | None = None
    disguised_mask: Tensor | None = None
    # int64[2·N, L] and bool[2·N, L]: N texts and their translations, where training aligns them; of no post.
    pair_ids: Tensor | None = None
    pair_mask: Tensor | None = None
    # float32[B, P] in [0, 1]: a teacher's scores; NaN where it gave none.
    teacher: Tensor | None = None

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> Batch:
        """What `stack` has made, copied: into page-locked memory where there is a GPU, to which copies from there run
        in the background."""
        values: dict[str, Any] = {
            name: _own(torch.from_numpy(value)) if isinstance(value, np.ndarray) else value
            for name, value in arrays.items()
        }
        images = arrays["pixels"]
        pixels = _memory((len(images), *images[0].shape))
        np.stack(images, out=pixels.numpy())
        return cls(**values | {"pixels": pixels.permute(0, 3, 1, 2)})

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value.to(device, non_blocking=True)
        return Batch(**values)


def collate(samples: Sequence[EncodedSample], *, pad_id: int, image_size: int, num_policies: int) -> Batch:
    """A batch of samples; the arguments are those of `stack`."""
    return Batch.of(stack(samples, pad_id=pad_id, image_size=image_size, num_policies=num_policies))


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

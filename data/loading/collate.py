"""What travels from the shards to the model: an encoded sample, the function that makes one, and a batch of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from crossguard.data.loading.sample import RawSample

NO_POST = -1


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
    # Position in the sample order; -1 outside training.
    position: int = -1


class Encode(Protocol):
    """Turns a post into numbers. Picklable: it is sent to the processes that read."""

    @property
    def fingerprint(self) -> str:
        """Changes when any token, pixel or label of any post could change."""
        ...

    @property
    def pad_id(self) -> int:
        """Token id that fills `Batch.input_ids`."""
        ...

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels."""
        ...

    @property
    def num_policies(self) -> int:
        """Length of the label vector."""
        ...

    def __call__(self, raw: RawSample) -> EncodedSample:
        """Encode one post; raises `MediaError` when its media cannot be decoded."""
        ...

    def text_length(self, text: str | None) -> int:
        """Number of tokens that the encoded text will have; 0 without text."""
        ...


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

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """The same batch on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU run in the background."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        values = self._values()
        return Batch(**values | {name: function(value) for name, value in values.items() if isinstance(value, Tensor)})

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __getstate__(self) -> dict[str, Any]:
        """Arrays instead of tensors, which torch would send one by one through shared memory of their own."""
        values = self._values() | {"pixels": self.pixels.permute(0, 2, 3, 1)}
        return {name: value.numpy() if isinstance(value, Tensor) else value for name, value in values.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, torch.from_numpy(value) if isinstance(value, np.ndarray) else value)
        self.pixels = self.pixels.permute(0, 3, 1, 2)


def collate(samples: Sequence[EncodedSample], *, pad_id: int, image_size: int, num_policies: int) -> Batch:
    """Stack samples into a batch, padded to its longest text.

    Args:
        samples: at least one.
        pad_id: token id that fills rows up.
        image_size: side S of the images, for a batch that has none.
        num_policies: length P of the label vectors.
    """
    input_ids, text_mask = _pad_texts(samples, pad_id)
    pixels, image_post = _stack_images(samples, image_size)
    labels = np.stack([sample.labels for sample in samples]).astype(np.float32, copy=False)
    if labels.shape != (len(samples), num_policies):
        raise ValueError(f"labels have shape {labels.shape[1:]}, the taxonomy has {num_policies} policies")
    return Batch(
        ids=[sample.id for sample in samples],
        languages=[sample.language for sample in samples],
        positions=torch.tensor([sample.position for sample in samples], dtype=torch.int64),
        input_ids=input_ids,
        text_mask=text_mask,
        has_text=torch.tensor([sample.input_ids is not None for sample in samples]),
        pixels=pixels,
        image_post=image_post,
        has_image=torch.tensor([bool(sample.images) for sample in samples]),
        labels=torch.from_numpy(labels),
    )


def _pad_texts(samples: Sequence[EncodedSample], pad_id: int) -> tuple[Tensor, Tensor]:
    texts = [sample.input_ids for sample in samples]
    longest = max([1, *(len(text) for text in texts if text is not None)])
    input_ids = np.full((len(texts), longest), pad_id, dtype=np.int64)
    text_mask = np.zeros((len(texts), longest), dtype=bool)
    for row, text in enumerate(texts):
        if text is not None:
            input_ids[row, : len(text)] = text
            text_mask[row, : len(text)] = True
    return torch.from_numpy(input_ids), torch.from_numpy(text_mask)


def _stack_images(samples: Sequence[EncodedSample], image_size: int) -> tuple[Tensor, Tensor]:
    images = [(row, image) for row, sample in enumerate(samples) for image in sample.images]
    if not images:
        return torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8), torch.tensor([NO_POST])
    pixels = np.empty((len(images), image_size, image_size, 3), dtype=np.uint8)
    for place, (_, image) in enumerate(images):
        pixels[place] = image.transpose(1, 2, 0)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor([row for row, _ in images])

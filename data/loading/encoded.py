"""A post as numbers, the function that makes one, and many of them side by side. What the processes that read need;
they never import torch, which would take seconds and more memory than everything else they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

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
    # int32[L]: the text in a disguise, L = 0 where there is none; None where nobody asks for it.
    disguised: np.ndarray | None = None


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

    def __call__(self, raw: RawSample, position: int = NO_POSITION) -> EncodedSample:
        """Encode one post that comes at `position` of the sample order; raises `MediaError` when its media cannot be
        decoded."""
        ...

    def text_length(self, text: str | None) -> int:
        """Number of tokens that the encoded text will have; 0 without text."""
        ...


def stack(samples: Sequence[EncodedSample], *, pad_id: int, image_size: int, num_policies: int) -> dict[str, Any]:
    """The fields of a `Batch`: arrays in place of tensors, texts padded to the longest, and in place of the pixels a
    list of images uint8[S, S, 3], which are laid side by side once, where the batch is to be.

    Args:
        samples: at least one.
        pad_id: token id that fills rows up.
        image_size: side S of the images, for a batch that has none.
        num_policies: length P of the label vectors.
    """
    input_ids, text_mask = pad_texts([sample.input_ids for sample in samples], pad_id)
    images = [(row, image.transpose(1, 2, 0)) for row, sample in enumerate(samples) for image in sample.images]
    images = images or [(NO_POST, np.zeros((image_size, image_size, 3), dtype=np.uint8))]
    labels = np.stack([sample.labels for sample in samples]).astype(np.float32, copy=False)
    if labels.shape != (len(samples), num_policies):
        raise ValueError(f"labels have shape {labels.shape[1:]}, the taxonomy has {num_policies} policies")
    arrays = {
        "ids": [sample.id for sample in samples],
        "languages": [sample.language for sample in samples],
        "positions": np.array([sample.position for sample in samples], dtype=np.int64),
        "input_ids": input_ids,
        "text_mask": text_mask,
        "has_text": np.array([sample.input_ids is not None for sample in samples]),
        "pixels": [image for _, image in images],
        "image_post": np.array([row for row, _ in images], dtype=np.int64),
        "has_image": np.array([bool(sample.images) for sample in samples]),
        "labels": labels,
    }
    if samples[0].disguised is not None:  # Then all have one.
        ids, mask = pad_texts([sample.disguised for sample in samples], pad_id)
        arrays |= {"disguised_ids": ids, "disguised_mask": mask}
    return arrays


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

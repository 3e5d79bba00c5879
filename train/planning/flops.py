"""Floating-point operations of a training step, from the lengths of its texts and its numbers of images.

What a post takes is a polynomial of degree two in both, since attention compares every token with every other. Its
coefficients are those of passes over shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.nn.attention import SDPBackend, sdpa_kernel

from crossguard.configs.schema import Config
from crossguard.configs.schema.model import ModelConfig
from crossguard.data.loading.collate import Batch
from crossguard.train.planning.shapes import Shapes

# Posts of a pass over shapes: one alone might be treated apart.
POSTS = 2


@dataclass(frozen=True)
class PostFlops:
    """Of 1, length, length², images, images², length · images, in this order: what each adds to a post's operations."""

    coefficients: tuple[float, ...]

    @classmethod
    def of_model(cls, config: Config) -> PostFlops:
        """Those of forward and backward pass, as torch's FlopCounterMode counts them: multiplications and additions.

        A backward pass takes twice the forward's, less what frozen parameters save. What is computed a second time to
        save memory does not count.

        Raises:
            UserError: the model cannot be run on shapes alone.
        """
        shapes = Shapes(config)
        points = _points(config.model)
        with sdpa_kernel(SDPBackend.MATH):  # Fused attention computes its scores once more on the way back.
            measured = [shapes.trace(POSTS, length=length, images=images).flops / POSTS for length, images in points]
        terms = np.array([_terms(length, images) for length, images in points], dtype=np.float64)
        # All terms at one scale, as numbers that are to be added need; those of an absent modality are 0.
        scale = np.maximum(terms.max(axis=0), 1)
        found = np.linalg.lstsq(terms / scale, np.array(measured), rcond=None)[0] / scale
        return cls(tuple(found.tolist()))

    def of(self, batch: Batch) -> float:
        """A step's operations for `batch`: each post counts with its own length, padding does not."""
        lengths = batch.text_mask.numpy().sum(axis=1, dtype=np.int64)
        owners = batch.image_post.numpy()
        images = np.bincount(owners[owners >= 0], minlength=len(lengths))
        terms = _terms(lengths, images)
        return float(sum(weight * np.sum(term) for weight, term in zip(self.coefficients, terms, strict=True)))


def _points(model: ModelConfig) -> list[tuple[int, int]]:
    """Lengths and numbers of images that determine a polynomial of degree two; 0 of a modality that is not read."""
    longest = model.text.max_length
    lengths = [longest // 4, longest // 2, longest] if "text" in model.modalities else [0]
    if "image" not in model.modalities:
        return [(length, 0) for length in lengths]
    return [*((length, 1) for length in lengths), (lengths[0], 2), (lengths[-1], 2), (lengths[0], 3)]


def _terms(length: Any, images: Any) -> list[Any]:
    """What a post's operations are made of."""
    return [length**0, length, length**2, images, images**2, length * images]

"""Floating-point operations of a training step, from how much its posts have of each modality.

What a post takes is a polynomial of degree two in tokens, images, frames and recordings, since attention compares every
token with every other. Its coefficients are those of passes over shapes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from crossguard.configs.schema import Config
from crossguard.configs.schema.model import ENCODED, ModelConfig
from crossguard.data.loading.collate import Batch
from crossguard.train.models.example import PostSize
from crossguard.train.planning.shapes import Shapes

# Posts of a pass over shapes: one alone might be treated apart.
POSTS = 2
_PAIRS = tuple(itertools.combinations_with_replacement(range(len(ENCODED)), 2))


@dataclass(frozen=True)
class PostFlops:
    """What each of the terms of `_terms` adds to a post's operations."""

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
        sizes = _sizes(config.model)
        with sdpa_kernel(SDPBackend.MATH):  # Fused attention computes its scores once more on the way back.
            seconds = config.model.audio.max_seconds
            measured = [
                shapes.trace(POSTS, replace(PostSize(*size), seconds=seconds)).flops / POSTS for size in sizes.tolist()
            ]
        # What a model does not look at does not count.
        read = [name in config.model.modalities for name in ENCODED]
        terms = _terms(np.where(read, sizes, 0))
        # All terms at one scale, as numbers that are to be added need; those of an absent modality are 0.
        scale = np.maximum(terms.max(axis=0), 1)
        found = np.linalg.lstsq(terms / scale, np.array(measured), rcond=None)[0] / scale
        return cls(tuple(found.tolist()))

    def of(self, batch: Batch) -> float:
        """A step's operations for `batch`: each post counts with its own length, padding does not."""
        posts = len(batch)
        sizes = np.zeros((posts, len(ENCODED)))
        sizes[:, 0] = batch.text_mask.numpy().sum(axis=1, dtype=np.int64)
        sizes[:, 1] = _counted(batch.image_post, posts)
        if batch.video is not None:
            sizes[:, 2] = _counted(batch.video.post, posts)
        if batch.audio is not None:
            sizes[:, 3] = _counted(batch.audio.post, posts)
        return float((_terms(sizes) @ np.array(self.coefficients)).sum())


def _counted(post: Tensor, posts: int) -> np.ndarray:
    """Pieces of each post."""
    owners = post.numpy()
    return np.bincount(owners[owners >= 0], minlength=posts)


def _sizes(model: ModelConfig) -> np.ndarray:
    """int[n, 4]: sizes of posts that determine a polynomial of degree two in what the model looks at: all at the
    smallest, each alone at a second and at a third, and every two at the second."""
    longest = model.text.length
    levels = ((longest // 4, longest // 2, longest), *((1, 2, 3) for _ in ENCODED[1:]))
    smallest = [sizes[0] for sizes in levels]
    looked_at = [place for place, name in enumerate(ENCODED) if name in model.modalities]
    points = [smallest]
    for place in looked_at:
        points += [[*smallest[:place], size, *smallest[place + 1 :]] for size in levels[place][1:]]
    for pair in itertools.combinations(looked_at, 2):
        points.append([sizes[place in pair] for place, sizes in enumerate(levels)])
    return np.array(points)


def _terms(sizes: np.ndarray) -> np.ndarray:
    """[n, 4] → float64[n, 15], what posts' operations are made of: 1, tokens, images, frames and recordings, each of
    the longest, and the products of every two."""
    products = [sizes[:, one] * sizes[:, other] for one, other in _PAIRS]
    return np.stack([np.ones(len(sizes)), *sizes.T, *products], axis=1).astype(np.float64)

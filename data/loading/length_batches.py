"""Batches of about one length: which of a window's samples share a batch, so that little is filled up with padding."""

from __future__ import annotations

import numpy as np

from crossguard.data.loading.permutation import Permutation, derive_key


def plan_by_length(lengths: np.ndarray, batch_size: int, start: int, seed: int) -> np.ndarray:
    """Rearrange samples by length: sorted, cut into batches, and the batches shuffled.

    Inside a batch the samples stay sorted: contiguous slices for ranks and micro-batches then hold the least padding,
    and since a batch spans only a small part of all lengths, ranks differ by no more than a few percent in tokens.
    Batches that are shared with what comes before or after take the shortest texts.

    Args:
        lengths: int[n], of the samples at positions start … start+n-1.
        batch_size: samples of a step over all ranks.
        start: the first position.
        seed: chooses the order of the batches.

    Returns:
        int64[n]: at each place, which of the n samples comes there.
    """
    count = len(lengths)
    by_length = np.argsort(lengths, kind="stable")
    head = min(-start % batch_size, count)
    tail = (count - head) % batch_size
    batches = by_length[head + tail :].reshape(-1, batch_size)
    shuffle = Permutation(len(batches), derive_key("batches", seed, start))
    shuffled = batches[shuffle(np.arange(len(batches)))]
    return np.concatenate([by_length[:head], shuffled.ravel(), by_length[head : head + tail]])

"""Batches of about one length: which of a window's samples share a batch, so that little is filled up with padding."""

from __future__ import annotations

import numpy as np

from crossguard.data.loading.permutation import Permutation, derive_key

# A batch that holds texts of one length only teaches one sort of text, or one language, at a time. So no more is sorted
# than needed: until so much of a batch would be padding if it were padded as a whole, and so much in passes of 32.
MAX_BATCH_PADDING, MAX_PASS_PADDING = 0.10, 0.04
PASS = 32
MAX_WINDOW = 128
SAMPLED = 1 << 17


def batches_to_sort(lengths: np.ndarray, batch_size: int) -> int:
    """How many batches have to be planned together for little padding: a power of 2, at most `MAX_WINDOW`.

    Args:
        lengths: int[n], of all samples.
        batch_size: samples of a step over all ranks.
    """
    sample = lengths[:: max(1, len(lengths) // SAMPLED)]
    sample = sample[Permutation(len(sample), derive_key("sample of lengths"))(np.arange(len(sample)))]
    window = 1
    while window < MAX_WINDOW and len(sample) >= window * batch_size:
        whole = len(sample) // (window * batch_size) * window * batch_size
        batches = np.sort(sample[:whole].reshape(-1, window * batch_size)).reshape(-1, batch_size)
        passes = batches[:, : max(1, batch_size // PASS) * PASS].reshape(-1, min(PASS, batch_size))
        if _padding(batches) <= MAX_BATCH_PADDING and _padding(passes) <= MAX_PASS_PADDING:
            return window
        window *= 2
    return MAX_WINDOW


def _padding(groups: np.ndarray) -> float:
    """Share of padding when each row of lengths is padded to its longest."""
    padded = int(groups.max(axis=1).sum()) * groups.shape[1]
    return 1 - int(groups.sum()) / padded if padded else 0.0


def plan_by_length(lengths: np.ndarray, batch_size: int, start: int, seed: int) -> np.ndarray:
    """Rearrange samples by length: sorted, cut into batches, and the batches shuffled.

    Inside a batch the samples stay sorted: contiguous slices for ranks and micro-batches then hold the least padding,
    and since a batch spans only a part of all lengths, eight ranks differ by no more than a tenth in tokens.
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

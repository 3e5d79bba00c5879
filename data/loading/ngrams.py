"""Character n-grams of a text as numbers, by hashing: any language, no vocabulary, nothing to load."""

from __future__ import annotations

import numpy as np

SPACE = ord(" ")
# FNV-1a (draft-eastlake-fnv) over code points, and the last step of MurmurHash3, which brings its high bits down.
OFFSET, PRIME, FINISH = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3), np.uint64(0xFF51AFD7ED558CCD)
HALF = np.uint64(33)


def hashed_ngrams(text: str, min_n: int, max_n: int, buckets: int) -> np.ndarray:
    """The buckets of all n-grams of `min_n` to `max_n` characters, in lower case and inside of words, as fastText
    finds them (arXiv 1607.04606): a space stands at each end of a word, and none in the middle of an n-gram. Each
    counts once, however often it comes. Takes some 100 µs for 100 characters.

    Returns:
        int32[K], each at least 0 and below `buckets`, in rising order.
    """
    words = text.lower().split()
    if not words:
        return np.zeros(0, dtype=np.int32)
    codes = np.frombuffer(f" {' '.join(words)} ".encode("utf-32-le", errors="replace"), dtype=np.uint32).astype(
        np.uint64
    )
    # How many spaces come before each place.
    spaces = np.concatenate([[0], np.cumsum(codes == SPACE)])
    hashes = np.full(len(codes) + 1, OFFSET)
    found = [np.zeros(0, dtype=np.int32)]
    for length in range(1, min(max_n, len(codes)) + 1):
        hashes = (hashes[:-1] ^ codes[length - 1 :]) * PRIME
        if length >= min_n:
            # The first and the last character may be a space, unless it is the only one.
            first, last = (0, 1) if length == 1 else (1, length - 1)
            whole = spaces[last:][: len(hashes)] == spaces[first:][: len(hashes)]
            found.append(_buckets(hashes[whole], buckets))
    return np.unique(np.concatenate(found))


def _buckets(hashes: np.ndarray, buckets: int) -> np.ndarray:
    mixed = (hashes ^ (hashes >> HALF)) * FINISH
    return ((mixed ^ (mixed >> HALF)) % np.uint64(buckets)).astype(np.int32)

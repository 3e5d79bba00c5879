"""Slices: the groups of posts that every metric is computed for, beside languages.

A slice is a field of the post (`region`, `modality`, `meta.topic`, …) or several of them joined by `+`, whose groups
are the combinations that occur.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from crossguard.configs.schema.evaluation import slice_fields
from crossguard.data.loading.reader import SampleError, ShardReader
from crossguard.data.loading.sample import RawSample
from crossguard.data.shards.index import AUDIO, IMAGE, TEXT, VIDEO

LANGUAGE, MODALITY = "language", "modality"
NONE, OTHER = "(none)", "(other)"
# Groups of a slice that are told apart, the largest ones.
MOST_GROUPS = 50
# A longer value is no category; it may be what a post says.
LONGEST_VALUE = 64
MODALITIES = {TEXT: "text", IMAGE: "image", VIDEO: "video", AUDIO: "audio"}
JOIN = "+"


def read_fields(reader: ShardReader, rows: Iterable[int], slices: Iterable[str]) -> dict[str, dict[str, str]]:
    """The fields of posts that slices are made of: id -> field -> value.

    Reads neither text nor media beyond the head of a post; one that cannot be read is left out.

    Args:
        reader: the split.
        rows: which posts.
        slices: as the configuration names them.
    """
    names = [name for name in slice_fields(slices) if name not in (LANGUAGE, MODALITY)]
    modalities = reader.column("modalities")
    found = {}
    for row in rows:
        try:
            post = reader.read_head(int(row))
        except SampleError:
            continue
        present = [name for bit, name in MODALITIES.items() if modalities[row] & bit]
        found[post.id] = {MODALITY: JOIN.join(present) or NONE} | {name: _value(post, name) for name in names}
    return found


def groups_of(slices: Iterable[str], languages: np.ndarray, fields: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Slice -> the group of each post, object[n].

    A field that is the same for all posts divides nothing and is left out, and so is a slice that divides the posts as
    languages or another slice before it do.
    """
    known = {name: values for name, values in {LANGUAGE: languages, **fields}.items() if len(set(values)) > 1}
    seen, found = [_codes(languages)], {}
    for name in slices:
        parts = [part for part in name.split(JOIN) if part in known]
        if not parts:
            continue
        groups = known[parts[0]]
        for part in parts[1:]:
            groups = groups + JOIN + known[part]
        groups = _largest(groups)
        codes = _codes(groups)
        if not any(np.array_equal(codes, other) for other in seen):
            seen.append(codes)
            found[JOIN.join(parts)] = groups
    return found


def _codes(groups: np.ndarray) -> np.ndarray:
    """int[n]: the same numbers for the same division, whatever its groups are called."""
    _, first, codes = np.unique(groups.astype(str), return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[codes]


def _largest(groups: np.ndarray) -> np.ndarray:
    values, codes, counts = np.unique(groups.astype(str), return_inverse=True, return_counts=True)
    if len(values) <= MOST_GROUPS:
        return groups
    kept = np.zeros(len(values), dtype=bool)
    kept[np.argsort(-counts, kind="stable")[:MOST_GROUPS]] = True
    return np.where(kept[codes], groups, OTHER)


def _value(post: RawSample, name: str) -> str:
    """A field as the name of a group; a dotted name leads into an object."""
    value: Any = post.post
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if name == "created_at" and value is not None:
        return str(value)[: len("2026-01")]
    if value is None or value == "":
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int | float) or len(str(value)) > LONGEST_VALUE:
        return OTHER
    return str(value)

"""Statistics of shards: counts by split, policy, language, stratum and modality; sizes and text lengths."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crossguard.configs.errors import UserError
from crossguard.configs.progress import progress
from crossguard.data.shards.executor import Processes
from crossguard.data.shards.files import pread
from crossguard.data.shards.folder import read_manifest
from crossguard.data.shards.index import AUDIO, IMAGE, TEXT, VIDEO, read_index
from crossguard.data.shards.manifest import ShardInfo
from crossguard.data.shards.members import BLOCK, read_header
from crossguard.data.shards.place import Place

MODALITIES = {"text": TEXT, "image": IMAGE, "video": VIDEO, "audio": AUDIO}
LABELS = ("violating", "benign", "fraction", "unknown")
PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
_FIELDS_BYTES = 2048  # enough for header and fields of nearly every post


@dataclass(frozen=True, slots=True)
class CountTask:
    """A shard whose posts are counted."""

    place: Place
    shard: ShardInfo
    policies: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Counted:
    """What a shard holds."""

    labels: Counter[tuple[str, str]]  # (policy, one of LABELS)
    languages: Counter[str]
    modalities: Counter[str]
    text_bytes: np.ndarray  # of the posts that have text


def stats(place: Place, num_workers: int) -> dict[str, Any]:
    """What a set of shards holds, as JSON; only ids' hashes and labels are read, never text or media.

    Args:
        place: where they lie.
        num_workers: processes that read shards.

    Raises:
        UserError: there is no manifest, it or a shard is damaged, or a URL cannot be opened.
        JobError: the storage fails.
    """
    manifest = read_manifest(place.location)
    policies = manifest.taxonomy.names
    tasks = [CountTask(place, shard, policies) for shard in manifest.shards]
    counted: dict[str, list[tuple[ShardInfo, Counted]]] = {split: [] for split in manifest.splits}
    with progress("stats", len(tasks), "shards") as shown:
        for task, result in Processes(num_workers).run(count, tasks):
            counted[task.shard.split].append((task.shard, result))
            shown.advance()
    return {
        "manifest": manifest.sha256,
        "version": manifest.version,
        "parent": manifest.parent or None,
        "posts": sum(manifest.splits.values()),
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "left_out": manifest.left_out,
        "refused": manifest.refused,
        "splits": {split: _split(parts, policies) for split, parts in counted.items()},
    }


def count(task: CountTask) -> Counted:
    """Count the posts of a shard.

    Raises:
        UserError: it is missing or damaged.
    """
    with task.place.files(task.shard.path, task.shard.index_path) as folder:
        try:
            return _count(task, folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"{task.place}/{task.shard.path}: cannot be counted ({type(error).__name__})"
            raise UserError(f"{what}; `crossguard shards verify {task.place}` says what is wrong") from None


def _count(task: CountTask, folder: Path) -> Counted:
    rows = read_index(folder / task.shard.index_path)
    counted = Counted(Counter(), Counter(), Counter(), rows["text_bytes"][rows["modalities"] & TEXT > 0])
    for name, bit in MODALITIES.items():
        counted.modalities[name] += int(np.count_nonzero(rows["modalities"] & bit))
    with (folder / task.shard.path).open("rb") as file:
        for offset in np.sort(rows["offset"]).tolist():
            post = _fields(file.fileno(), offset)
            counted.languages[post["language"]] += 1
            for policy in task.policies:
                counted.labels[policy, _state(post["labels"].get(policy))] += 1
    return counted


def _fields(descriptor: int, offset: int) -> dict[str, Any]:
    """The fields of the post whose sample starts at `offset`."""
    data = pread(descriptor, offset, _FIELDS_BYTES)
    header = read_header(data, 0)
    content = data[BLOCK : BLOCK + header.size]
    if len(content) < header.size:
        content = pread(descriptor, offset + BLOCK, header.size)
    fields: dict[str, Any] = json.loads(content)
    return fields


def _state(label: float | None) -> str:
    if label is None:
        return "unknown"
    return "violating" if label == 1 else "benign" if label == 0 else "fraction"


def _split(parts: list[tuple[ShardInfo, Counted]], policies: tuple[str, ...]) -> dict[str, Any]:
    counts = [counted for _, counted in parts]
    labels = sum((counted.labels for counted in counts), Counter())
    strata = sum((Counter(shard.strata) for shard, _ in parts), Counter())
    lengths = np.concatenate([counted.text_bytes for counted in counts])
    return {
        "posts": sum(shard.samples for shard, _ in parts),
        "shards": len(parts),
        "bytes": sum(shard.bytes for shard, _ in parts),
        "policies": {policy: {state: labels[policy, state] for state in LABELS} for policy in policies},
        "languages": _ordered(sum((counted.languages for counted in counts), Counter())),
        "strata": _ordered(strata),
        "modalities": {name: sum(counted.modalities[name] for counted in counts) for name in MODALITIES},
        "text_bytes": {
            name: int(np.percentile(lengths, percent, method="lower")) if len(lengths) else None
            for name, percent in PERCENTILES.items()
        },
    }


def _ordered(counts: Counter[str]) -> dict[str, int]:
    """The most frequent ones first; ties by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

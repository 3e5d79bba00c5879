"""The plan of a build: which post goes to which shard. A pure function of the posts, never of workers or file order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from crossguard.configs.schema.taxonomy import BENIGN, UNKNOWN
from crossguard.data.curation.governance import RULES
from crossguard.data.records import canonical_json
from crossguard.data.shards.files import atomic_file, write_atomic
from crossguard.data.shards.manifest import Manifest, ShardInfo
from crossguard.data.shards.spool import SpoolWriter
from crossguard.data.taxonomy import POSITIVE_FROM

FILE_NAME = "plan.json"
_ROWS = "rows.npy"
OVER_LIMIT = "limit"


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A run of rows that one tar will hold."""

    path: str  # <split>/<shard>.tar
    start: int
    stop: int

    @property
    def index_path(self) -> str:
        """Path of the index beside the tar."""
        return f"{self.path.removesuffix('.tar')}.idx"


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the writers need beside the rows, which lie in a file of their own."""

    inputs: str
    parent: str  # sha256 of the manifest that is appended to, or empty
    rarity: tuple[str, ...]
    strata: tuple[str, ...]
    left_out: dict[str, int]
    roots: tuple[str, ...]  # folders that media paths start from
    shards: tuple[PlannedShard, ...]

    @property
    def posts(self) -> int:
        """Posts that are to be written."""
        return sum(shard.stop - shard.start for shard in self.shards)

    def save(self, folder: Path, rows: np.ndarray) -> None:
        """Write the plan and its rows; the plan comes last, so that it stands for a finished scan."""
        with atomic_file(folder / _ROWS) as file:
            np.save(file, rows, allow_pickle=False)
        write_atomic(folder / FILE_NAME, canonical_json(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Plan | None:
        """The plan of a scan that was finished, if there is one."""
        try:
            value = json.loads((folder / FILE_NAME).read_bytes())
        except FileNotFoundError:
            return None
        return cls(
            inputs=value["inputs"],
            parent=value["parent"],
            rarity=tuple(value["rarity"]),
            strata=tuple(value["strata"]),
            left_out=value["left_out"],
            roots=tuple(value["roots"]),
            shards=tuple(PlannedShard(**shard) for shard in value["shards"]),
        )


def load_rows(folder: Path) -> np.ndarray:
    """The rows of the plan in `folder`, mapped into memory."""
    rows: np.ndarray = np.load(folder / _ROWS, mmap_mode="r", allow_pickle=False)
    return rows


def make_plan(
    spool: SpoolWriter,
    policies: tuple[str, ...],
    inputs: str,
    limit: int | None,
    samples_per_shard: int,
    parent: Manifest | None = None,
    held: np.ndarray | None = None,
) -> tuple[Plan, np.ndarray]:
    """The plan for the posts of a spool, and their rows in the order of the shards.

    Args:
        spool: the posts.
        policies: in the order of the taxonomy.
        inputs: hash of the posts and settings.
        limit: take at most so many posts, those with the smallest keys.
        samples_per_shard: posts in a shard.
        parent: the manifest to append to; its rarity and strata stay as they are, its shards are numbered on.
        held: bool[posts], those that the parent's shards hold; they are not planned again.
    """
    held = np.zeros(len(spool.rows), dtype=bool) if held is None else held
    rows = spool.rows[~held]
    left_out = {rule: int(np.sum(rows["left_out"] == 1 + number)) for number, rule in enumerate(RULES)}
    usable = np.flatnonzero(rows["left_out"] == 0)
    room = None if limit is None else max(0, limit - int(held.sum()))
    chosen = usable[np.argsort(rows["key"][usable], kind="stable")][:room]
    left_out[OVER_LIMIT] = len(usable) - len(chosen)

    # By split and, in a split, by key: any run of rows is a fair mixture.
    splits = sorted(spool.splits)
    rank = np.array([splits.index(name) for name in spool.splits], dtype=np.int64)
    ordered = rows[chosen[np.argsort(rank[rows["split"][chosen]], kind="stable")]]
    if parent:
        rarity = [policies.index(name) for name in parent.rarity]
    else:
        rarity = _rarity(ordered["positive"][ordered["split"] == spool.splits.get("train", -1)])
    strata = _assign_strata(ordered, list(spool.languages), policies, rarity, parent.strata if parent else ())
    counts = np.bincount(ordered["split"], minlength=len(splits)).tolist()
    shards = _cut([(split, counts[spool.splits[split]]) for split in splits], samples_per_shard, parent)
    plan = Plan(
        inputs=inputs,
        parent=parent.sha256 if parent else "",
        rarity=tuple(policies[number] for number in rarity),
        strata=strata,
        left_out=left_out,
        roots=tuple(spool.roots),
        shards=shards,
    )
    return plan, ordered


def _rarity(positive: np.ndarray) -> list[int]:
    """Numbers of the policies, rarest first; ties in the order of the taxonomy."""
    order: list[int] = np.argsort(positive.sum(axis=0), kind="stable").tolist()
    return order


def _assign_strata(
    rows: np.ndarray, languages: list[str], policies: tuple[str, ...], rarity: list[int], known: tuple[str, ...]
) -> tuple[str, ...]:
    """Number each row's stratum as `stratum_of` names it; the `known` strata come first."""
    names = [*(policies[number] for number in rarity), BENIGN, UNKNOWN]
    labeled = rows["labeled"][:, None]
    # The first name that is true of a row.
    rarest = np.concatenate([rows["positive"][:, rarity], labeled, ~labeled], axis=1).argmax(axis=1)
    codes, inverse = np.unique(rows["language"].astype(np.int64) * len(names) + rarest, return_inverse=True)
    found = [f"{languages[code // len(names)]}/{names[code % len(names)]}" for code in codes.tolist()]
    strata = [*known, *sorted(set(found) - set(known))]
    numbers = np.array([strata.index(name) for name in found], dtype=np.uint32)
    rows["stratum"] = numbers[inverse] if len(rows) else 0
    return tuple(strata)


def stratum_of(language: str, labels: Mapping[str, float], rarity: tuple[str, ...]) -> str:
    """The stratum of one post: its language and the rarest policy that it violates; else whether any label is known.

    Args:
        language: of the post.
        labels: its known labels.
        rarity: the policies, rarest first.
    """
    otherwise = BENIGN if labels else UNKNOWN
    return f"{language}/{next((name for name in rarity if labels.get(name, 0) >= POSITIVE_FROM), otherwise)}"


def _cut(splits: list[tuple[str, int]], size: int, parent: Manifest | None) -> tuple[PlannedShard, ...]:
    """Runs of at most `size` rows for splits, (name, rows) each, that follow one another; shards are numbered on."""
    shards, begin = [], 0
    for split, count in splits:
        first = _next_number(parent.shards_of(split)) if parent else 0
        for number, start in enumerate(range(begin, begin + count, size), start=first):
            stop = min(start + size, begin + count)
            shards.append(PlannedShard(f"{split}/{split}-{number:05d}.tar", start, stop))
        begin += count
    return tuple(shards)


def _next_number(shards: tuple[ShardInfo, ...]) -> int:
    """The number after those of a split's shards."""
    return 1 + max((int(Path(shard.path).stem.rpartition("-")[2]) for shard in shards), default=-1)

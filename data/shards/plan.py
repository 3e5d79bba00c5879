"""The plan of a build: which post goes to which shard. A pure function of the posts, never of workers or file order."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from crossguard.configs.schema.taxonomy import BENIGN
from crossguard.data.curation.governance import RULES
from crossguard.data.records import canonical_json
from crossguard.data.shards.files import atomic_file, write_atomic
from crossguard.data.shards.spool import SpoolWriter

_PLAN, _ROWS = "plan.json", "rows.npy"
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
        write_atomic(folder / _PLAN, canonical_json(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Plan | None:
        """The plan of a scan that was finished, if there is one."""
        try:
            value = json.loads((folder / _PLAN).read_bytes())
        except FileNotFoundError:
            return None
        return cls(
            inputs=value["inputs"],
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
    spool: SpoolWriter, policies: tuple[str, ...], inputs: str, limit: int | None, samples_per_shard: int
) -> tuple[Plan, np.ndarray]:
    """The plan for all posts of a spool, and their rows in the order of the shards.

    Args:
        spool: the posts.
        policies: in the order of the taxonomy.
        inputs: hash of the posts and settings.
        limit: take at most so many posts, those with the smallest keys.
        samples_per_shard: posts in a shard.
    """
    rows = spool.rows
    left_out = {rule: int(np.sum(rows["left_out"] == 1 + number)) for number, rule in enumerate(RULES)}
    usable = np.flatnonzero(rows["left_out"] == 0)
    chosen = usable[np.argsort(rows["key"][usable], kind="stable")][:limit]
    left_out[OVER_LIMIT] = len(usable) - len(chosen)

    # By split and, in a split, by key: any run of rows is a fair mixture.
    splits = sorted(spool.splits)
    rank = np.array([splits.index(name) for name in spool.splits], dtype=np.int64)
    ordered = rows[chosen[np.argsort(rank[rows["split"][chosen]], kind="stable")]]
    rarity = _rarity(ordered["positive"][ordered["split"] == spool.splits.get("train", -1)])
    strata = _assign_strata(ordered, list(spool.languages), policies, rarity)
    counts = np.bincount(ordered["split"], minlength=len(splits)).tolist()
    shards = _cut([(split, counts[spool.splits[split]]) for split in splits], samples_per_shard)
    plan = Plan(inputs, tuple(policies[number] for number in rarity), strata, left_out, tuple(spool.roots), shards)
    return plan, ordered


def _rarity(positive: np.ndarray) -> list[int]:
    """Numbers of the policies, rarest first; ties in the order of the taxonomy."""
    order: list[int] = np.argsort(positive.sum(axis=0), kind="stable").tolist()
    return order


def _assign_strata(
    rows: np.ndarray, languages: list[str], policies: tuple[str, ...], rarity: list[int]
) -> tuple[str, ...]:
    """Number each row's stratum, language × rarest positive policy or benign, and name the strata that occur."""
    names = [*(policies[number] for number in rarity), BENIGN]
    with_benign = np.concatenate([rows["positive"][:, rarity], np.ones((len(rows), 1), dtype=bool)], axis=1)
    rarest = with_benign.argmax(axis=1)
    codes, inverse = np.unique(rows["language"].astype(np.int64) * len(names) + rarest, return_inverse=True)
    found = [f"{languages[code // len(names)]}/{names[code % len(names)]}" for code in codes.tolist()]
    strata = sorted(found)
    numbers = np.array([strata.index(name) for name in found], dtype=np.uint32)
    rows["stratum"] = numbers[inverse] if len(rows) else 0
    return tuple(strata)


def _cut(splits: list[tuple[str, int]], size: int) -> tuple[PlannedShard, ...]:
    """Runs of at most `size` rows for splits, (name, rows) each, that follow one another."""
    shards, begin = [], 0
    for split, count in splits:
        for number, start in enumerate(range(begin, begin + count, size)):
            stop = min(start + size, begin + count)
            shards.append(PlannedShard(f"{split}/{split}-{number:05d}.tar", start, stop))
        begin += count
    return tuple(shards)

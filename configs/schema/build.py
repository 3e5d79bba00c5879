"""How posts become shards."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from crossguard.configs.errors import UserError
from crossguard.configs.schema.checks import at_least, one_of, within

EXECUTORS = ("processes", "ray", "slurm")

# A split is a folder of the shards.
SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass
class BuildConfig:
    """Shard size, processes and what is tolerated."""

    # Processes that write shards at a time, on all machines together; any number writes the same bytes.
    num_workers: int = 2
    # Where they run: `processes` of this machine, `ray`, a cluster whose machines share the folders of shards and
    # media (pip install 'crossguard[ray]'), or `slurm`, a job array on machines that share them.
    executor: str = "processes"
    # Options of sbatch for that array, e.g. ["--partition=cpu", "--mem=8G"].
    slurm_options: list[str] = field(default_factory=list)
    # The Ray cluster; by default the one that this machine belongs to, else one is started here for the build.
    ray_address: str | None = None
    # Where shards are there already: add shards for the posts that are new. Those that are there stay as they are; a
    # post that has changed since, or is gone, is an error.
    append: bool = False
    # Posts in a shard; the last shard of a split may hold fewer.
    samples_per_shard: int = 2000
    # Share of the posts that may be refused (missing or corrupt media) before the build fails.
    max_refused: float = 0.01
    # How many wrong input lines are listed before the rest is only counted.
    max_errors_listed: int = 100
    # Share of each split for posts that name none; assigned by a hash of `group` (or the id).
    splits: dict[str, float] = field(default_factory=lambda: {"train": 0.8, "validation": 0.1, "test": 0.1})

    def __post_init__(self) -> None:
        at_least("build.num_workers", self.num_workers, 1)
        one_of("build.executor", self.executor, EXECUTORS)
        at_least("build.samples_per_shard", self.samples_per_shard, 1)
        within("build.max_refused", self.max_refused, 0, 1)
        at_least("build.max_errors_listed", self.max_errors_listed, 1)
        for name in self.splits:
            if not SPLIT_NAME.fullmatch(name):
                raise UserError(f"build.splits: name '{name}': use letters, digits, '-' and '_'")
        if any(share < 0 for share in self.splits.values()) or abs(sum(self.splits.values()) - 1) > 1e-6:
            raise UserError(f"build.splits={dict(self.splits)}: the shares must be positive and add up to 1")

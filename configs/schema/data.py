"""Where posts come from and where their shards lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from crossguard.configs.schema.checks import above, at_least, one_of
from crossguard.configs.schema.mixing import MixingConfig

SOURCES = ("jsonl", "table", "hf", "webdataset", "synthetic")


@dataclass
class CacheConfig:
    """This node's copies of shards that lie behind a URL, shared by its ranks, workers and jobs."""

    # Folder of the cache; by default `crossguard/shards` in $XDG_CACHE_HOME or ~/.cache.
    dir: str | None = None
    # What it may hold, in gigabytes (1e9 bytes); what was not used for longest goes first.
    max_gb: float = 100.0

    def __post_init__(self) -> None:
        above("data.cache.max_gb", self.max_gb, 0)


@dataclass
class DataConfig:
    """Posts in, shards out."""

    # What kind of input `path` is; `module:name` names a source of your own.
    source: str = "jsonl"
    # A file or a folder of them (jsonl, table, webdataset), or a dataset id or folder (hf); relative to the
    # working directory.
    path: str | None = None
    # Where build writes and train reads shards: a folder, or a URL such as s3://bucket/folder (any that fsspec opens);
    # by default `shards` inside the run directory.
    shards: str | None = None
    # Copies of shards that lie behind a URL.
    cache: CacheConfig = field(default_factory=CacheConfig)
    # The shares of datasets, languages and policies in training.
    mixing: MixingConfig = field(default_factory=MixingConfig)
    # At most this many posts, chosen by a hash of their ids, for a first look; by default all.
    limit: int | None = None
    # For table and hf: the folder that media paths start from; by default that of the table.
    media_dir: str | None = None
    # For table, hf and webdataset: a post's field -> the column it is read from,
    # e.g. {text: tweet, labels.hate: is_hate}.
    columns: dict[str, str] = field(default_factory=dict)
    # Further arguments of the source; each source lists its own.
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def has_posts(self) -> bool:
        """Whether it says where posts come from; without, shards must be there."""
        return self.source == "synthetic" or self.path is not None

    def __post_init__(self) -> None:
        one_of("data.source", self.source, SOURCES, or_own=True)
        at_least("data.limit", self.limit, 1)

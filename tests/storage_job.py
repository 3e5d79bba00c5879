"""What the tests of storage run in processes of their own: reading all posts of a set of shards in a random order."""

from __future__ import annotations

import json
import random
import sys

from crossguard.configs.schema.data import CacheConfig
from crossguard.data.loading.reader import ShardReader
from crossguard.data.shards.folder import ShardFolder


def texts(folder: ShardFolder, seed: int = 0) -> dict[str, str | None]:
    """Id -> text."""
    reader = ShardReader([folder], "train")
    rows = random.Random(seed).sample(range(len(reader)), len(reader))
    return {sample.id: sample.text for sample in map(reader.read, rows)}


if __name__ == "__main__":
    url, cache, max_gb, seed = sys.argv[1:]
    config = CacheConfig(dir=cache, max_gb=float(max_gb))
    json.dump(texts(ShardFolder.open(url, config), int(seed)), sys.stdout)

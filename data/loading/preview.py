"""The samples of any training step, without reading those of the steps before."""

from __future__ import annotations

import time
from pathlib import Path

from crossguard.configs.errors import UserError
from crossguard.configs.schema import Config
from crossguard.data.loading.collate import Encode
from crossguard.data.loading.plan import plan_training
from crossguard.data.shards.folder import ShardFolder


def preview(config: Config, run_dir: Path, step: int, encode: Encode) -> list[str]:
    """Ids of the global batch of `step` ≥ 1, in the order of their positions.

    Samples that turn out to be damaged only when they are read are shown as planned.

    Raises:
        UserError: no such step, or no shards.
    """
    if step < 1:
        raise UserError(f"step={step}: steps begin at 1")
    folder = ShardFolder.open(config.shards_location, config.data.cache)
    reader, order = plan_training(config, folder, run_dir, encode, time.time())
    return [reader.read_head(int(row)).id for row in order.rows(step)]

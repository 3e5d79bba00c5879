"""What training reads and in which order: the one construction that the train loop and the preview share."""

from __future__ import annotations

from pathlib import Path

from crossguard.configs.schema import Config
from crossguard.data.loading.collate import Encode
from crossguard.data.loading.lengths import token_lengths
from crossguard.data.loading.order import SampleOrder
from crossguard.data.loading.reader import ShardReader
from crossguard.data.shards.folder import ShardFolder

TRAIN_SPLIT = "train"


def plan_training(
    config: Config, folder: ShardFolder, run_dir: Path, encode: Encode, now: float, *, speak: bool = False
) -> tuple[ShardReader, SampleOrder]:
    """The training split and its order. Posts that are past their expiry at `now` (seconds since 1970) are redirected.

    Counts token lengths into `<run_dir>/lengths/` unless they are there: let one rank do so before the others.

    Raises:
        UserError: there is no training split, or nothing in it may be read.
    """
    reader = ShardReader([folder], TRAIN_SPLIT)
    lengths = token_lengths(reader, encode, run_dir / "lengths", config.train.num_workers, speak=speak)
    expired = reader.expired_rows(now)
    return reader, SampleOrder(len(reader), config.train.batch_size, config.seed, lengths, expired)

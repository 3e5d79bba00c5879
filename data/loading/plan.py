"""What training reads and in which order: the one construction that the train loop and the queries share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from crossguard.configs.errors import UserError
from crossguard.configs.schema import Config
from crossguard.configs.schema.mixing import OWN, MixingConfig
from crossguard.data.loading.encoded import Encode
from crossguard.data.loading.lengths import token_lengths
from crossguard.data.loading.order import SampleOrder
from crossguard.data.loading.reader import ShardReader
from crossguard.data.loading.refused import Refused
from crossguard.data.loading.strata import Layout
from crossguard.data.shards.folder import ShardFolder

TRAIN_SPLIT = "train"
Planned = tuple[ShardReader, SampleOrder]


def open_folders(config: Config, mixing: MixingConfig | None = None) -> dict[str, ShardFolder]:
    """The shards of the recipe and those that are mixed in, by name.

    Args:
        config: says where they lie.
        mixing: what was mixed in, if it may be something else than the configuration says; those that the configuration
            does not name lie where they lay.

    Raises:
        UserError: shards are not there, were built with another taxonomy, or have no training split.
    """
    datasets = config.data.mixing.datasets
    if mixing is not None:
        datasets = {name: datasets.get(name, location) for name, location in mixing.datasets.items()}
    locations = {OWN: config.shards_location, **datasets}
    folders = {name: ShardFolder.open(location, config.data.cache) for name, location in locations.items()}
    for name, folder in folders.items():
        folder.manifest.check_taxonomy(folders[OWN].manifest.taxonomy)
        if not folder.manifest.shards_of(TRAIN_SPLIT):
            where = folder.location if name == OWN else f"data.mixing.datasets.{name}: {folder.location}"
            raise UserError(f"{where}: no split '{TRAIN_SPLIT}'; it has {', '.join(folder.manifest.splits) or 'none'}")
    return folders


def plan_training(
    config: Config,
    folders: dict[str, ShardFolder],
    run_dir: Path,
    encode: Encode,
    *,
    first_step: int = 1,
    speak: bool = False,
) -> Planned:
    """The training split and its order.

    Counts token lengths into `<run_dir>/lengths/` unless they are there: let one rank do so before the others.

    Args:
        config: the recipe.
        folders: as `open_folders` gives them.
        run_dir: where the lengths lie.
        encode: whose tokens are counted.
        first_step: the first step of this order.
        speak: show progress.
    """
    reader = ShardReader(list(folders.values()), TRAIN_SPLIT)
    lengths = token_lengths(reader, encode, run_dir / "lengths", config.train.num_workers, speak=speak)
    layout = Layout.of_shards(
        [(name, folder.manifest.strata, folder.manifest.shards_of(TRAIN_SPLIT)) for name, folder in folders.items()]
    )
    order = SampleOrder(
        layout,
        config.train.batch_size,
        config.seed,
        config.data.mixing,
        lengths=lengths,
        first_step=first_step,
    )
    return reader, order


def continue_order(
    plan: Callable[[int], Planned], saved: Mapping[str, Any] | None, refused: Refused, step: int, *, new_order: bool
) -> tuple[ShardReader, SampleOrder, Refused]:
    """The order that goes on after `step`, and the rows that it goes around.

    Args:
        plan: `plan_training` for a given first step.
        saved: the state of the order in the checkpoint, if there is one.
        refused: what that order went around.
        step: steps done.
        new_order: where this one is another, begin it after `step`.

    Raises:
        UserError: it is another order, and no new one is asked for.
    """
    if saved is None:
        return *plan(1), refused
    reader, order = plan(saved["first_step"])
    try:
        order.go_on(saved, reader.manifest_hash, refused.rows)
    except UserError:
        if not new_order:
            raise
        if saved["manifest"] != reader.manifest_hash:  # other rows
            refused = Refused.none()
        reader, order = plan(step + 1)
        order.refuse(refused.rows)
    return reader, order, refused


def unreadable_rows(reader: ShardReader, now: float) -> np.ndarray:
    """int64[…]: rows whose posts have expired at `now` (seconds since 1970), or whose shard is not there."""
    return np.union1d(reader.expired_rows(now), reader.missing_rows())

"""What a rank trains on: shards that are those of the manifest, and one order on every rank, also after a resume."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crossguard.configs.errors import UserError
from crossguard.configs.schema import Config
from crossguard.data.curation.attacks import TextAttacks
from crossguard.data.loading.order import SampleOrder
from crossguard.data.loading.plan import Planned, continue_order, open_folders, plan_training, unreadable_rows
from crossguard.data.loading.reader import SampleError, ShardReader
from crossguard.data.loading.refused import Refused
from crossguard.data.shards.folder import ShardFolder
from crossguard.data.taxonomy import Taxonomy
from crossguard.train.encode import PostEncoder
from crossguard.train.ranks import Ranks


@dataclass
class Inputs:
    """What is trained on."""

    # The recipe's own shards; validation reads them too.
    folder: ShardFolder
    encode: PostEncoder
    reader: ShardReader
    order: SampleOrder
    # The rows that the order goes around.
    refused: Refused

    def refuse(self, refused: Refused) -> None:
        """Go around more rows from now on."""
        self.refused = refused
        self.order.refuse(refused.rows)


def open_inputs(config: Config, ranks: Ranks, step: int, saved: Mapping[str, Any] | None, refused: Refused) -> Inputs:
    """Open shards and order; all ranks call it.

    Args:
        config: the recipe.
        ranks: all of them.
        step: steps done before.
        saved: the state of the order in the checkpoint, if there is one.
        refused: what the checkpoint's order goes around.

    Raises:
        UserError: shards, taxonomy or order do not fit the recipe or the checkpoint, too many shards are missing, or no
            label is known.
    """
    run_dir = Path(config.run_dir)
    taxonomy = Taxonomy.from_config(config.taxonomy)
    folders = ranks.on_first(lambda: _checked_folders(config, taxonomy, ranks))
    attacks, families = config.train.attacks, tuple(config.train.attacks.families)
    encode = PostEncoder(
        config.model,
        taxonomy,
        attacks=TextAttacks(attacks.probability, families, str(config.seed), attacks.once)
        if attacks.probability
        else None,
        disguises=TextAttacks(1.0, families, f"{config.seed}/second") if config.train.consistency.weight else None,
    )

    def plan(first_step: int, speak: bool = False) -> Planned:
        return plan_training(config, folders, run_dir, encode, first_step=first_step, speak=speak)

    # The first rank counts token lengths, the others find them counted.
    ranks.on_first(lambda: plan(1, speak=True)[1].num_samples)
    reader, order, refused = continue_order(plan, saved, refused, step, new_order=config.train.new_order)
    if order.first_step == step + 1 > 1:
        ranks.say(f"train: a new sample order from step {step + 1} on")
    inputs = Inputs(next(iter(folders.values())), encode, reader, order, refused)
    # One clock and one look at the folder decide what is not read.
    rows = ranks.on_first(lambda: unreadable_rows(reader, time.time()))
    inputs.refuse(refused.add(rows, step + 1))
    ranks.on_first(lambda: _check_labels(reader))
    return inputs


def missing_samples(inputs: Inputs, max_refused: float, step: int) -> list[dict[str, Any]]:
    """A line of quarantine.jsonl for each sample whose shard is not there since `step`; rank 0 calls it.

    Raises:
        UserError: they are more than may be refused.
    """
    reader, refused = inputs.reader, inputs.refused
    rows = reader.missing_rows()
    if len(rows) > max_refused * len(reader):
        raise UserError(
            f"{reader.place}: shards of {len(rows)} of the {len(reader)} training samples are missing, more than "
            f"train.max_refused={max_refused}; restore them, or raise it"
        )
    return [
        {
            "key": _key(reader, row),
            "row": row,
            "split": reader.split,
            "stage": "train",
            "step": step,
            "reason": "its shard is missing",
        }
        # Those that were missing at an earlier start are named already.
        for row in np.intersect1d(rows, refused.rows[refused.since == step]).tolist()
    ]


def _check_labels(reader: ShardReader) -> None:
    """Refuse posts without any known label, whose loss would be 0 from the first step on; one of the first has one."""
    for row in range(len(reader)):
        with contextlib.suppress(SampleError):
            if any(label is not None for label in reader.read_head(row).post["labels"].values()):
                return
    raise UserError(
        f"train: none of the {len(reader)} training posts has a known label; give `labels` to posts of split 'train'"
    )


def _checked_folders(config: Config, taxonomy: Taxonomy, ranks: Ranks) -> dict[str, ShardFolder]:
    folders = open_folders(config)
    for folder in folders.values():
        folder.manifest.check_taxonomy(taxonomy)
        warn_of_lost(folder, ranks)
    return folders


def warn_of_lost(folder: ShardFolder, ranks: Ranks) -> None:
    """Rank 0: say at once which shards are not what was written; their samples are named when their turn comes.

    Raises:
        UserError: an index changed.
        JobError: the storage fails.
    """
    if lost := folder.check_files():
        ranks.say(
            f"warning: {folder.location}: {len(lost)} of {len(folder.manifest.shards)} shards are missing or have "
            f"another size, the first is {lost[0].path}"
        )


def _key(reader: ShardReader, row: int) -> str:
    try:
        reader.read_head(row)
    except SampleError as error:
        return error.key
    raise AssertionError(f"row {row} was missing a moment ago")

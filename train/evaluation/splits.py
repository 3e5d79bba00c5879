"""Which splits of the shards a job trains on and evaluates. Cheap: asked before any rank starts, and again by them."""

from __future__ import annotations

from collections.abc import Iterable

from crossguard.configs.errors import UserError
from crossguard.configs.schema import Config
from crossguard.configs.suggest import did_you_mean
from crossguard.data.shards.manifest import Manifest

TRAIN, VALIDATION, TEST = "train", "validation", "test"


def evaluated_splits(config: Config, manifest: Manifest) -> list[str]:
    """The splits of the final evaluation, in the order of the report.

    Raises:
        UserError: the shards lack one that is named, or have none but the training split.
    """
    splits = config.evaluation.splits or [split for split in manifest.splits if split != TRAIN]
    for split in splits:
        if split not in manifest.splits:
            raise UserError(
                f"evaluation.splits: no split '{split}' in the shards; {did_you_mean(split, manifest.splits)}"
            )
    if config.evaluation.references and TRAIN not in manifest.splits:
        raise UserError(f"evaluation.references: the shards have no split '{TRAIN}' that one could be fitted on")
    if not splits:
        raise UserError(f"the shards have no split but '{TRAIN}', nothing to evaluate; see build.splits")
    return splits


def shown_split(splits: Iterable[str]) -> str:
    """The split that a report speaks of first: test, else the first of them."""
    names = list(splits)
    return TEST if TEST in names else names[0]


def check_trained_splits(config: Config, manifest: Manifest) -> None:
    """Refuse shards without a split that training needs.

    Raises:
        UserError: there is nothing to train on, or nothing to validate on although the configuration asks for it.
    """
    needed = {TRAIN: "training", **({VALIDATION: "evaluation.every_steps"} if config.evaluation.every_steps else {})}
    for split, what in needed.items():
        if split not in manifest.splits:
            raise UserError(
                f"the shards have no split '{split}', which {what} needs; they have {', '.join(manifest.splits)}; "
                f"give posts `split: {split}`, or build from more: build.splits deals them out by a hash of their ids"
            )

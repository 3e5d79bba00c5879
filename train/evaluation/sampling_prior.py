"""What training's sampling did to the share of violations, in logits: calibration takes it off again.

Where strata are evened out (`data.mixing.temperature`) or further datasets are mixed in, violations are commoner, or
rarer, in training than in the posts as they are, and a model's logits move by the difference of the log odds (Elkan,
2001). Languages with many labels show that by themselves; for those with few it is known beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crossguard.configs.saved import part_of
from crossguard.configs.schema.loss import LogitAdjustmentConfig
from crossguard.configs.schema.mixing import OWN, MixingConfig
from crossguard.configs.schema.taxonomy import BENIGN
from crossguard.data.loading.order import group_shares
from crossguard.data.loading.strata import Layout
from crossguard.data.shards.folder import ShardFolder
from crossguard.data.shards.labels import LabelCounts
from crossguard.data.taxonomy import POSITIVE_FROM
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.objectives.balance import log_odds

TRAIN = "train"
Shifts = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Trained:
    """How the checkpoint that is scored was trained, whatever the configuration of its evaluation says."""

    # The steps that it has learned from.
    step: int
    mixing: MixingConfig
    adjustment: LogitAdjustmentConfig

    @classmethod
    def of(cls, config: Mapping[str, Any], checkpoint: Path, step: int) -> Trained:
        """From the configuration in a checkpoint; a UserError where this version of the schema refuses it.

        What an older version did not have yet is at its default, which does what was done before.
        """
        return cls(
            step,
            part_of(MixingConfig, config["data"].get("mixing", {}), checkpoint),
            part_of(LogitAdjustmentConfig, config["train"]["loss"].get("logit_adjustment", {}), checkpoint),
        )


def sampling_shifts(
    folders: Mapping[str, ShardFolder], trained: Trained, rarity: Sequence[str], labeled: Predictions
) -> Shifts:
    """How far training's sampling has moved the logits.

    Args:
        folders: the recipe's own shards (`own`) and those that are mixed in.
        trained: the mixing. Where it changed on the way, by `data.mixing.changes` or when training was resumed, that of
            the checkpoint's last step counts: the weights were last fitted to it.
        rarity: the policies, rarest first, as strata name them.
        labeled: posts with labels, which tell how often posts of a stratum violate other policies as well.

    Returns:
        policy -> language -> logits to subtract; languages that it moves by nothing are left out.
    """
    mixing = trained.mixing
    shards = {name: folder.manifest.shards_of(TRAIN) for name, folder in folders.items()}
    if (mixing.temperature == 1 and len(folders) == 1) or not all(shards.values()):
        return {}
    layout = Layout.of_shards([(name, folder.manifest.strata, shards[name]) for name, folder in folders.items()])
    sizes = dict(zip(layout.datasets.names, layout.datasets.sizes.tolist(), strict=True))
    passed = [change.weights for change in mixing.changes if change.after_step < trained.step]
    sampled = group_shares(layout, mixing, passed[-1] if passed else mixing.weights or sizes)
    if mixing.temperature == 1:  # the shares of datasets: each stratum has its part of one
        sampled = sampled[layout.dataset_of_stratum] / layout.datasets.sizes[layout.dataset_of_stratum]
        sampled = sampled * layout.strata.sizes
    natural = np.where(layout.dataset_of_stratum == list(folders).index(OWN), layout.strata.sizes, 0)
    names = [name.partition(":")[2].rpartition("/") for name in layout.strata.names]
    languages = np.array([language for language, _, _ in names], dtype=object)
    rates = _rates(labeled, rarity)
    shifts: Shifts = {}
    for policy in labeled.policies:
        known, positive = np.array([rates.get(kind, {}).get(policy, (0.0, 0.0)) for _, _, kind in names]).T
        for language in sorted(set(languages)):
            rows = languages == language
            odds = [_log_odds(weight[rows], known[rows], positive[rows]) for weight in (sampled, natural)]
            shift = odds[0] - odds[1]
            if np.isfinite(shift) and shift:
                shifts.setdefault(policy, {})[str(language)] = float(shift)
    return shifts


def adjusted(shifts: Shifts, config: LogitAdjustmentConfig, counts: LabelCounts) -> Shifts:
    """The same shifts where the loss has added the log odds of each language to the logits, which so came to lack them.

    Those of a policy in all languages are left to calibration: its labels are enough to show them.
    """
    if not (config.tau and config.by_language):
        return shifts
    odds = log_odds(config, counts)
    return {
        policy: {
            language: shifts.get(policy, {}).get(language, 0.0) - float(odds[row, column])
            for row, language in enumerate(counts.languages)
        }
        for column, policy in enumerate(counts.policies)
    }


def _rates(labeled: Predictions, rarity: Sequence[str]) -> dict[str, dict[str, tuple[float, float]]]:
    """Kind of stratum -> policy -> the shares of its posts whose label is known, and whose label is positive."""
    known = ~np.isnan(labeled.labels)
    positive = known & (np.nan_to_num(labeled.labels) >= POSITIVE_FROM)
    kind = np.where(known.any(axis=1), BENIGN, "").astype(object)
    for policy in reversed(rarity):
        kind[positive[:, labeled.policies.index(policy)]] = policy
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name in set(kind) - {""}:
        rows = kind == name
        found[str(name)] = {
            policy: (float(known[rows, column].mean()), float(positive[rows, column].mean()))
            for column, policy in enumerate(labeled.policies)
        }
    return found


def _log_odds(weights: np.ndarray, known: np.ndarray, positive: np.ndarray) -> float:
    """Of the known labels of strata with these weights; not finite where one kind is missing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.log((weights * positive).sum()) - np.log((weights * (known - positive)).sum()))

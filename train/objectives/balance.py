"""Weights and priors of labels, from the counts in the manifest alone: the same on every rank and after a resume."""

from __future__ import annotations

import numpy as np

from crossguard.configs.schema.loss import BalanceConfig, LogitAdjustmentConfig
from crossguard.data.shards.labels import LabelCounts

# A policy's prior in a language is its prior in all of them until so many labels of the language say otherwise.
PRIOR_LABELS = 10.0


def label_weights(config: BalanceConfig, counts: LabelCounts) -> np.ndarray:
    """Weights of benign and violating labels by language and policy.

    Returns:
        float32[languages, 2, P], whose mean over the known labels is 1.
    """
    table = np.stack([counts.known - counts.violating, counts.violating], axis=1)
    weights = np.ones_like(table)
    if "class" in config.by:
        weights *= _rarity(table.sum(axis=0), config)[None]
    if "language" in config.by:
        weights *= _rarity(table.sum(axis=(1, 2)), config)[:, None, None]
    return (weights * table.sum() / (weights * table).sum()).astype(np.float32)


def log_odds(config: LogitAdjustmentConfig, counts: LabelCounts) -> np.ndarray:
    """tau times the log odds of a violation among the known labels: float32[languages, P].

    Half a label is added on either side, which keeps them finite.
    """
    violating, benign = counts.violating.sum(axis=0), (counts.known - counts.violating).sum(axis=0)
    rate = (violating + 0.5) / (violating + benign + 1)
    if config.by_language:
        rate = (counts.violating + PRIOR_LABELS * rate) / (counts.known + PRIOR_LABELS)
    odds = np.log(rate) - np.log1p(-rate)
    return np.broadcast_to(config.tau * odds, counts.known.shape).astype(np.float32)


def _rarity(sizes: np.ndarray, config: BalanceConfig) -> np.ndarray:
    """What a label counts that belongs to a group of `sizes` labels."""
    sizes = np.maximum(sizes, 1)  # Nobody asks for the weight of what is not there.
    if config.beta is not None:
        sizes = (1 - config.beta**sizes) / (1 - config.beta)
    return sizes**-config.exponent

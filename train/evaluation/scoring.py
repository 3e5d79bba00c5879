"""Scoring a split: every row once, over any number of ranks, with the same scores as on one.

Whole batches are dealt to the ranks, so that every post is scored beside the same posts whatever their number: not even
the last digit of a score depends on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import nn

from crossguard.configs.errors import JobError, Preempted
from crossguard.configs.progress import progress
from crossguard.data.loading.collate import Batch, collate
from crossguard.data.loading.embeddings import Embeddings
from crossguard.data.loading.encoded import EncodedSample
from crossguard.data.loading.loader import EvalLoader
from crossguard.data.loading.reader import ShardReader
from crossguard.data.taxonomy import Taxonomy, hold_parents
from crossguard.train import phases, preemption
from crossguard.train.encode import PostEncoder
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.ranks import Ranks


def score_split(
    model: nn.Module,
    encode: PostEncoder,
    reader: ShardReader,
    rows: np.ndarray,
    ranks: Ranks,
    batch_size: int,
    *,
    num_workers: int = 0,
    on_refused: Callable[[dict[str, Any]], None],
    title: str = "",
    embeddings: Embeddings | None = None,
) -> Predictions:
    """The model's predictions on `rows` of a split, gathered on every rank; all ranks call it.

    Args:
        model: called with a `Batch`, gives logits float[B, L], those of the policies first; left in evaluation mode.
        encode: the model's own.
        reader: the split.
        rows: int[…], the same on every rank; each is scored once.
        ranks: share out the rows.
        batch_size: posts in a forward pass of a rank.
        num_workers: processes that read for each rank.
        on_refused: is told of every post that could not be read; those are left out.
        title: what rank 0 shows the progress of; nothing is shown without.
        embeddings: of the posts, where they stand in for what is in them.

    Raises:
        JobError: a score is not finite.
        Preempted: a rank was asked to stop; on all ranks.
    """
    dealt, nothing = _deal(reader, rows, batch_size, ranks.world_size), filler(encode, embeddings)
    options: dict[str, Any] = {"num_workers": num_workers, "on_refused": on_refused, "embeddings": embeddings}
    loader = EvalLoader(reader, dealt[ranks.rank], encode, batch_size, **options)
    with (
        preemption.holding(),
        phases.resting_after(),
        closing(iter(loader)) as batches,
        progress(title, len(rows), "posts", speak=bool(title) and ranks.is_first) as shown,
    ):
        model.eval()
        parts = list[Predictions]()
        for count in _posts_of_passes(dealt, batch_size):
            phases.enter(phases.EVALUATION)
            parts += _score_next(model, encode, next(batches, None), nothing, ranks)
            shown.advance(count)
            _check_not_preempted(ranks.any(preemption.asked()))
        asked, scored = zip(*ranks.gather((preemption.asked(), parts)), strict=True)
        _check_not_preempted(any(asked))
    return _finite(Predictions.gather(encode.taxonomy.names, itertools.chain(*scored)), reader.split)


def _score_next(
    model: nn.Module, encode: PostEncoder, batch: Batch | None, nothing: Batch, ranks: Ranks
) -> list[Predictions]:
    """Score a batch; a rank that has none left still runs the model, which others may be waiting for."""
    # Convolutions in full fp32 on GPUs too, as on CPUs.
    exact = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)
    with torch.no_grad(), exact:
        logits = model((batch or nothing).to(ranks.device))
    return [] if batch is None else [_predictions(encode.taxonomy, batch, logits)]


def _check_not_preempted(asked: bool) -> None:
    if asked:
        raise Preempted("the evaluation was stopped; start again and it is done anew")


def _deal(reader: ShardReader, rows: np.ndarray, batch_size: int, world_size: int) -> list[np.ndarray]:
    """The rows of each rank: batches of about one length, dealt in turn. Rank 0 has most."""
    # In the order of EvalLoader, which is stable: it cuts each rank's rows into these very batches.
    rows = rows[np.argsort(-reader.column("text_bytes")[rows].astype(np.int64), kind="stable")]
    owner = np.arange(len(rows)) // batch_size % world_size
    return [rows[owner == rank] for rank in range(world_size)]


def _posts_of_passes(dealt: list[np.ndarray], batch_size: int) -> list[int]:
    """How many posts each forward pass scores, over all ranks.

    Under ZeRO-3 a pass gathers weights from all ranks: everyone makes as many as the busiest.
    """
    starts = range(0, len(dealt[0]), batch_size)
    return [sum(len(rows[start : start + batch_size]) for rows in dealt) for start in starts]


def _finite(predictions: Predictions, split: str) -> Predictions:
    wrong = np.flatnonzero(~np.isfinite(predictions.scores).all(axis=1))
    if len(wrong):
        raise JobError(
            f"split {split}: the scores of {len(wrong)} posts are not finite, the first is "
            f"'{predictions.ids[wrong[0]]}'; the weights have diverged: train with a lower train.lr"
        )
    return predictions


def _predictions(taxonomy: Taxonomy, batch: Batch, logits: torch.Tensor) -> Predictions:
    chances, labels = torch.sigmoid(logits.double()).cpu().numpy(), batch.labels.cpu().numpy()
    policies = slice(len(taxonomy.names))
    # The levels' probabilities add up to the level that is to be expected.
    severity = {
        policy: np.stack([chances[:, levels].sum(1), labels[:, levels].sum(1)], axis=1)
        for policy, levels in taxonomy.severities.items()
    }
    # Logits are in order already; of nearly equal ones the sigmoid may round either way.
    scores = hold_parents(chances[:, policies], taxonomy.names, taxonomy.parents)
    return Predictions(taxonomy.names, batch.ids, batch.languages, scores, labels[:, policies], severity=severity)


def filler(encode: PostEncoder, embeddings: Embeddings | None = None) -> Batch:
    """A batch of one empty post, for a rank that has none left; what the model says of it is thrown away."""
    empty = EncodedSample("", "und", None, [], np.full(encode.num_labels, np.nan, dtype=np.float32))
    batch = collate([empty], **encode.layout)
    if embeddings is not None:
        batch.embeddings = {name: torch.from_numpy(array) for name, array in embeddings.blank().items()}
    return batch

"""What training reads beside the posts: their texts in disguise, and pairs of translations.

All texts go through the text tower at once, as rows of one batch: so every module runs once for every batch, whatever
is read beside the posts, and images are looked at once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from crossguard.data.loading.collate import Batch

if TYPE_CHECKING:
    from crossguard.train.models.classifier import Classifier


def read_views(model: Classifier, batch: Batch, pad_id: int) -> dict[str, Tensor]:
    """The logits of a batch of B posts, "logits" float32[B, P]; those of their "disguised" texts beside the same
    images, float32[B, P], and the summaries of the texts of "pairs", float[2·N, D], where the batch has them."""
    posts = len(batch)
    disguised = batch.disguised_ids is not None
    read = model.read(with_views(batch, pad_id))
    pairs = {} if batch.pair_ids is None else {"pairs": read["text"].summary[(1 + disguised) * posts :]}
    judged = {name: tokens.take(slice(posts)) for name, tokens in read.items()}
    if not disguised:
        return {"logits": model.judge(judged), **pairs}
    judged = {name: tokens.twice() for name, tokens in judged.items()}
    judged["text"] = read["text"].take(slice(2 * posts))
    logits, others = model.judge(judged).split(posts)
    return {"logits": logits, "disguised": others, **pairs}


def with_views(batch: Batch, pad_id: int) -> Batch:
    """The posts, then their texts in disguise, then the texts of the pairs, each as a post that has text alone."""
    ids, masks, present = [batch.input_ids], [batch.text_mask], [batch.has_text]
    if batch.disguised_ids is not None and batch.disguised_mask is not None:
        ids.append(batch.disguised_ids)
        # Modality dropout takes both away, or none.
        masks.append(batch.disguised_mask & batch.has_text[:, None])
        present.append(batch.has_text)
    if batch.pair_ids is not None and batch.pair_mask is not None:
        ids.append(batch.pair_ids)
        masks.append(batch.pair_mask)
        present.append(batch.pair_mask[:, 0])
    longest = max(part.shape[1] for part in ids)
    more = sum(map(len, ids)) - len(batch)
    return replace(
        batch,
        ids=[*batch.ids, *[""] * more],
        languages=[*batch.languages, *[""] * more],
        positions=F.pad(batch.positions, (0, more)),
        input_ids=torch.cat([F.pad(part, (0, longest - part.shape[1]), value=pad_id) for part in ids]),
        text_mask=torch.cat([F.pad(part, (0, longest - part.shape[1])) for part in masks]),
        has_text=torch.cat(present),
        has_image=F.pad(batch.has_image, (0, more)),
    )

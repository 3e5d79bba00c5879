"""What training reads beside the posts: their texts in disguise, and pairs of translations.

All texts go through the text tower at once, as rows of one batch: so every module runs once for every batch, whatever
is read beside the posts, and media are looked at once.
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
    judged = model.dropped({name: tokens.take(slice(posts)) for name, tokens in read.items()}, batch.positions)
    if not disguised:
        return {"logits": model.judge(judged), **pairs}
    judged = {name: tokens.twice() for name, tokens in judged.items()}
    # Modality dropout takes both texts away, or none.
    judged["text"] = replace(read["text"].take(slice(2 * posts)), present=judged["text"].present)
    logits, others = model.judge(judged).split(posts)
    return {"logits": logits, "disguised": others, **pairs}


def with_views(batch: Batch, pad_id: int) -> Batch:
    """The posts, then their texts in disguise, then the texts of the pairs, each as a post that has text alone."""
    texts = [(batch.input_ids, batch.text_mask, batch.segments, batch.has_text)]
    if batch.disguised_ids is not None and batch.disguised_mask is not None:
        texts.append((batch.disguised_ids, batch.disguised_mask, batch.disguised_segments, batch.has_text))
    if batch.pair_ids is not None and batch.pair_mask is not None:
        texts.append((batch.pair_ids, batch.pair_mask, None, batch.pair_mask[:, 0]))
    longest = max(ids.shape[1] for ids, *_ in texts)
    more = sum(len(ids) for ids, *_ in texts) - len(batch)

    def wide(part: Tensor, value: int = 0) -> Tensor:
        return F.pad(part, (0, longest - part.shape[1]), value=value)

    segments = None
    if any(own is not None for _, _, own, _ in texts):
        segments = torch.cat([wide(torch.zeros_like(ids) if own is None else own) for ids, _, own, _ in texts])
    return replace(
        batch,
        ids=[*batch.ids, *[""] * more],
        languages=[*batch.languages, *[""] * more],
        positions=F.pad(batch.positions, (0, more)),
        input_ids=torch.cat([wide(ids, pad_id) for ids, *_ in texts]),
        text_mask=torch.cat([wide(mask) for _, mask, _, _ in texts]),
        segments=segments,
        has_text=torch.cat([present for *_, present in texts]),
        ngram_starts=F.pad(batch.ngram_starts, (0, more), value=len(batch.ngrams)),
        has_image=F.pad(batch.has_image, (0, more)),
        video=batch.video and replace(batch.video, present=F.pad(batch.video.present, (0, more))),
        audio=batch.audio and replace(batch.audio, present=F.pad(batch.audio.present, (0, more))),
    )

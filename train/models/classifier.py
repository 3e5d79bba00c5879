"""The classifier: a tower for each modality, their fusion, heads with a logit for each policy."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from crossguard.configs.schema.model import MODALITIES, NGRAMS, ModelConfig
from crossguard.data.loading.collate import Batch
from crossguard.data.taxonomy import Taxonomy
from crossguard.train.models.audio import Hearing, build_audio_tower
from crossguard.train.models.embedding import FRONTS, FUSED, Seam, is_frozen, pack, unpack
from crossguard.train.models.fusion import build_fusion
from crossguard.train.models.heads import Heads
from crossguard.train.models.image import Normalise, build_image_tower
from crossguard.train.models.lora import add_lora
from crossguard.train.models.modality_dropout import drop_modalities
from crossguard.train.models.ngrams import NgramTower
from crossguard.train.models.pieces import by_post
from crossguard.train.models.segments import Segments
from crossguard.train.models.text import build_text_tower
from crossguard.train.models.tokens import Tokens, summarise
from crossguard.train.models.video import FramePool
from crossguard.train.models.views import read_views

T = TypeVar("T")


class Classifier(nn.Module):
    """Posts in, logits out.

    Every module runs for every batch, also when no post has its modality, so that ranks whose batches differ still
    gather and reduce the same parameters. A post's logits do not depend on the posts beside it, nor on padding.
    """

    def __init__(self, config: ModelConfig, taxonomy: Taxonomy, vocab_size: int, pad_id: int, seed: int):
        super().__init__()
        self.modalities = tuple(config.modalities)
        # Those with a tower of their own.
        self.towers = tuple(config.encoders)
        self.pooling, self.image_pooling, self.pad_id = config.text.pooling, config.image.pooling, pad_id
        self.modality_dropout, self.seed = config.modality_dropout, seed
        widths = {}
        if "text" in self.modalities:
            self.text = build_text_tower(config.text, vocab_size, pad_id)
            widths["text"] = self.text.width
            add_lora(self.text, config.text.lora, "model.text.lora")
            self.segments = Segments(1 + len(config.text.fields), self.text.width) if config.text.fields else None
        if "ngrams" in self.modalities:
            self.ngrams = NgramTower(config.ngrams)
        if "image" in self.modalities:
            self.normalise = Normalise(config.image.mean, config.image.std)
            self.image = build_image_tower(config.image)
            widths["image"] = self.image.width
            add_lora(self.image, config.image.lora, "model.image.lora")
        if "video" in self.modalities:
            self.shares_image_tower = config.shares_image_encoder
            if not self.shares_image_tower:
                encoder = config.frame_encoder
                self.normalise_frames = Normalise(encoder.mean, encoder.std)
                self.video = build_image_tower(encoder, "video")
                add_lora(self.video, encoder.lora, "model.video.lora")
            widths["video"] = (self.image if self.shares_image_tower else self.video).width
            self.frames = FramePool(widths["video"], config.video.frames, config.frame_encoder.pooling)
        if "audio" in self.modalities:
            self.audio = build_audio_tower(config.audio)
            widths["audio"] = self.audio.width
            add_lora(self.audio, config.audio.lora, "model.audio.lora")
            self.hearing = Hearing(self.audio.width)
        # N-grams alone have nothing to be joined with.
        self.fusion = build_fusion(config.fusion, widths) if widths else None
        width = self.fusion.output_width if self.fusion is not None else 0
        self.heads = Heads(config.heads, taxonomy, width, self.ngrams.width if "ngrams" in self.modalities else 0)

    def train(self, mode: bool = True) -> Classifier:
        """Switch to training, all but batch normalisation, which keeps its statistics, and towers or a fusion of which
        nothing is trained.

        With the statistics of a micro-batch, logits would depend on the posts beside a post, and ranks would drift
        apart. What is frozen says the same of a post each time, whether it is computed each time or once.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        for name in (*FRONTS, "fusion"):
            part = self._modules.get(name)
            if part is not None and is_frozen(part):
                part.eval()
        return self

    def forward(self, batch: Batch, embed: Seam | None = None, *, views: bool = False) -> Any:
        """A batch of B posts → logits float32[B, L], in the order of the label vector; with `embed`, what crosses that
        seam, as `embedding.pack` lays it out. A batch of such embeddings goes on from there. With `views`, what
        `read_views` says of it."""
        if embed is not None:
            return self._embed(batch, embed)
        if views:
            return read_views(self, batch, self.pad_id)
        return self.judge(self.dropped(self.read(batch), batch.positions), batch.embeddings.get(FUSED))

    def _embed(self, batch: Batch, seam: Seam) -> dict[str, Tensor]:
        modalities = self.read(batch, seam.modalities)
        if not seam.fused:
            return pack(modalities, seam)
        beside = {name: modalities.pop(name) for name in seam.modalities if name == NGRAMS}
        return {FUSED: given(self.fusion)(modalities).float(), **pack(beside, seam)}

    def dropped(self, modalities: dict[str, Tokens], positions: Tensor) -> dict[str, Tokens]:
        """What is left of the modalities of B posts after modality dropout, in training."""
        if not (self.training and self.modality_dropout):
            return modalities
        return drop_modalities(modalities, positions, self.modality_dropout, self.seed)

    def read(self, batch: Batch, names: Collection[str] = MODALITIES) -> dict[str, Tokens]:
        """What each modality's tower says of a batch of B posts, by default of all modalities; what is among the
        batch's embeddings is not looked at again."""
        modalities = unpack(batch.embeddings)
        left = {name for name in self.modalities if name in names and name not in modalities}
        if FUSED in batch.embeddings:
            left &= {NGRAMS}
        if "text" in left:
            modalities["text"] = self._read_text(batch)
        if NGRAMS in left:
            values = self.ngrams(given(batch.ngrams), given(batch.ngram_starts))
            modalities[NGRAMS] = Tokens(values, batch.has_text[:, None], values[:, 0], batch.has_text)
        patches, frames = self._look(batch, left)
        if patches is not None:
            values, there = by_post(patches, batch.image_post, len(batch))
            mask = there.repeat_interleave(patches.shape[1], dim=1)
            # The mean over all tokens of all images, or over the first one of each.
            step = 1 if self.image_pooling == "mean" else patches.shape[1]
            summary = summarise(values[:, ::step], mask[:, ::step], "mean")
            modalities["image"] = Tokens(values, mask, summary, batch.has_image)
        if frames is not None:
            video = given(batch.video)
            values, mask, summary = self.frames(frames, video.times, video.post, len(batch))
            modalities["video"] = Tokens(values, mask, summary, video.present)
        if "audio" in left:
            sound = given(batch.audio)
            heard, there = self.audio(sound.values.to(self._dtype), sound.lengths)
            values, mask, summary = self.hearing(heard, there, sound.post, len(batch))
            modalities["audio"] = Tokens(values, mask, summary, sound.present)
        # In the order that the fusion knows.
        return {name: modalities[name] for name in MODALITIES if name in modalities}

    def judge(self, modalities: dict[str, Tokens], fused: Tensor | None = None) -> Tensor:
        """What the towers say of B posts, as `read` gives it, or what the fusion made of it → logits float32[B, L]."""
        ngrams = modalities.get(NGRAMS)
        # A post whose text was dropped has none.
        beside = None if ngrams is None else torch.where(ngrams.present[:, None], ngrams.summary, 0.0)
        if fused is None:
            joined = {name: tokens for name, tokens in modalities.items() if name != NGRAMS}
            fused = self.fusion(joined) if self.fusion is not None else given(beside)[:, :0]
        logits: Tensor = self.heads(fused, beside)
        return logits

    @property
    def _dtype(self) -> torch.dtype:
        """What the towers are given to read."""
        return next(iter(given(self.fusion).absent.values())).dtype

    def _read_text(self, batch: Batch) -> Tokens:
        mask = batch.text_mask.clone()
        # A post without text reads one token of padding: attention over nothing is not a number.
        mask[:, 0] |= ~batch.has_text
        values = self.text(batch.input_ids, mask)
        if self.segments is not None:
            segments = torch.zeros_like(batch.input_ids) if batch.segments is None else batch.segments
            values = self.segments(values, segments)
        return Tokens(values, mask, summarise(values, mask, self.pooling), batch.has_text)

    def _look(self, batch: Batch, names: Collection[str]) -> tuple[Tensor | None, Tensor | None]:
        """The patches float[N, T, D] of all images, and those float[F, T, D] of all frames."""
        patches = frames = None
        if "video" in names and self.shares_image_tower:
            # In one pass: a tower that ran twice would gather its weights twice under ZeRO-3.
            both = torch.cat([batch.pixels, given(batch.video).pixels])
            patches, frames = self.image(self.normalise(both).to(self._dtype)).split(
                [len(batch.pixels), len(both) - len(batch.pixels)]
            )
            return patches, frames
        if "image" in names:
            patches = self.image(self.normalise(batch.pixels).to(self._dtype))
        if "video" in names:
            frames = self.video(self.normalise_frames(given(batch.video).pixels).to(self._dtype))
        return patches, frames


def given(part: T | None) -> T:
    """A part of a batch that was made for a model which looks at it."""
    assert part is not None, "the batch was encoded for another model"
    return part

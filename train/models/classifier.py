"""The classifier: a tower for each modality, their fusion, heads with a logit for each policy."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from crossguard.configs.schema.model import ModelConfig
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
            widths["ngrams"] = self.ngrams.width
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
            self.frames = FramePool(widths["video"], config.video.frames)
        if "audio" in self.modalities:
            self.audio = build_audio_tower(config.audio)
            widths["audio"] = self.audio.width
            add_lora(self.audio, config.audio.lora, "model.audio.lora")
            self.hearing = Hearing(self.audio.width)
        self.fusion = build_fusion(config.fusion, widths)
        self.heads = Heads(config.heads, taxonomy, self.fusion.output_width)

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
        if FUSED in batch.embeddings:
            return self.heads(batch.embeddings[FUSED])
        modalities = unpack(batch.embeddings) if batch.embeddings else self.read(batch)
        return self.judge(self.dropped(modalities, batch.positions))

    def _embed(self, batch: Batch, seam: Seam) -> dict[str, Tensor]:
        modalities = self.read(batch)
        return {FUSED: self.fusion(modalities).float()} if seam.fused else pack(modalities, seam)

    def dropped(self, modalities: dict[str, Tokens], positions: Tensor) -> dict[str, Tokens]:
        """What is left of the modalities of B posts after modality dropout, in training."""
        if not (self.training and self.modality_dropout):
            return modalities
        return drop_modalities(modalities, positions, self.modality_dropout, self.seed)

    def read(self, batch: Batch) -> dict[str, Tokens]:
        """What each modality's tower says of a batch of B posts."""
        modalities = {}
        if "text" in self.modalities:
            modalities["text"] = self._read_text(batch)
        if "ngrams" in self.modalities:
            values = self.ngrams(batch.ngrams, batch.ngram_starts)
            modalities["ngrams"] = Tokens(values, batch.has_text[:, None], values[:, 0], batch.has_text)
        patches, frames = self._look(batch)
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
        if "audio" in self.modalities:
            sound = given(batch.audio)
            heard, there = self.audio(sound.values.to(self._dtype), sound.lengths)
            values, mask, summary = self.hearing(heard, there, sound.post, len(batch))
            modalities["audio"] = Tokens(values, mask, summary, sound.present)
        return modalities

    def judge(self, modalities: dict[str, Tokens]) -> Tensor:
        """What the towers say of B posts, as `read` gives it → logits float32[B, L]."""
        logits: Tensor = self.heads(self.fusion(modalities))
        return logits

    @property
    def _dtype(self) -> torch.dtype:
        """What the towers are given to read."""
        return next(iter(self.fusion.absent.values())).dtype

    def _read_text(self, batch: Batch) -> Tokens:
        mask = batch.text_mask.clone()
        # A post without text reads one token of padding: attention over nothing is not a number.
        mask[:, 0] |= ~batch.has_text
        values = self.text(batch.input_ids, mask)
        if self.segments is not None:
            segments = torch.zeros_like(batch.input_ids) if batch.segments is None else batch.segments
            values = self.segments(values, segments)
        return Tokens(values, mask, summarise(values, mask, self.pooling), batch.has_text)

    def _look(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """The patches float[N, T, D] of all images, and those float[F, T, D] of all frames."""
        patches = frames = None
        dtype = self._dtype
        if "video" in self.modalities and self.shares_image_tower:
            # In one pass: a tower that ran twice would gather its weights twice under ZeRO-3.
            both = torch.cat([batch.pixels, given(batch.video).pixels])
            patches, frames = self.image(self.normalise(both).to(dtype)).split(
                [len(batch.pixels), len(both) - len(batch.pixels)]
            )
            return patches, frames
        if "image" in self.modalities:
            patches = self.image(self.normalise(batch.pixels).to(dtype))
        if "video" in self.modalities:
            frames = self.video(self.normalise_frames(given(batch.video).pixels).to(dtype))
        return patches, frames


def given(part: T | None) -> T:
    """A part of a batch that was made for a model which looks at it."""
    assert part is not None, "the batch was encoded for another model"
    return part
